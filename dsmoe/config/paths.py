"""What a path in a config means: one rule for every key that holds one."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsmoe.config.yaml_text import COMMAND_LINE, Node

_MADE = ("runs_dir", "data.cache_dir")
"""Folders that dsmoe makes."""
_READ = ("cluster.hostfile", "data.tokenizer", "checkpoint.resume", "checkpoint.weights_from")
"""Files and folders that are there already."""
NO_PATHS = {"data.tokenizer": ("bytes",), "checkpoint.resume": ("auto", "always", "never")}
BUILTIN = "builtin:"
_SOURCE = re.compile(r"data\.sources\.\d+\.path")
_lost: dict[str, tuple[str, ...]] = {}
"""Relative paths that led to nothing when they were read, with what they would have been beside the YAML file."""
_unset: dict[str, tuple[str, ...]] = {}
"""Paths with the names of variables in them that the environment did not have when they were read."""
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
"""`$$` stands for a dollar sign."""


def resolve_paths(tree: Node, problems: list[str]) -> None:
    """Put the paths of a config in place of what the file says.

    `~` and `$NAME` or `${NAME}` become what they stand for; before a name that is no variable's, a dollar sign is part
    of a file's name. A relative path of a file or folder that is to be read is that beside the YAML file which says it,
    if it is there, and else that in the working directory, as on the command line. Folders that dsmoe makes are made in
    the working directory.
    """
    for key, holder, slot, is_read in _paths(tree):
        node = holder[slot]
        value = node.value
        if not _is_path(key, value):
            continue
        if "\0" in value:
            problems.append(f"{key}: a path cannot have a null character ({node.where})")
            continue
        path = expand_path(key, value, node.where, problems)
        if is_read and node.where != COMMAND_LINE and path and not os.path.isabs(path):
            path = _beside(path, node.where)
        holder[slot] = Node(path, node.where)


def variables_of(path: str) -> list[str]:
    """The names of the variables in a path of a config, set or not."""
    return [match[2] or match[3] for match in _VARIABLE.finditer(path) if match[1] is None]


def is_of_host(path: str) -> bool:
    """Whether what a path of a config stands for depends on the user and the environment that read it."""
    return path.startswith("~") or bool(variables_of(path))


def paths_as_written(tree: Node) -> dict[str, str]:
    """The text of each path in a config that is not resolved yet, by its key."""
    values = {key: holder[slot].value for key, holder, slot, _ in _paths(tree)}
    return {key: value for key, value in values.items() if _is_path(key, value)}


def write_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """A config's values with each dollar sign of its paths written twice, so that loading them gives the same."""
    for key in (*_MADE, *_READ):
        section, _, name = key.rpartition(".")
        holder = tree[section] if section else tree
        if isinstance(holder[name], str):
            holder[name] = literal_path(holder[name])
    for source in tree["data"]["sources"]:
        if isinstance(source["path"], str):
            source["path"] = literal_path(source["path"])
    return tree


def literal_path(path: str) -> str:
    """A path as a config says it, so that nothing in it is taken for a variable or for somebody's home."""
    path = f"./{path}" if path.startswith("~") else path
    return _VARIABLE.sub(lambda match: f"$${match[0][1:]}" if match[1] is None else "$$$$", path)


def is_path(key: str, value: Any) -> bool:
    """Whether a value of a flattened config is a path, which may be written otherwise and lead to the same."""
    return (key in (*_MADE, *_READ) or _SOURCE.fullmatch(key) is not None) and _is_path(key, value)


def _is_path(key: str, value: Any) -> bool:
    return isinstance(value, str) and value not in NO_PATHS.get(key, ()) and not value.startswith(BUILTIN)


def _paths(tree: Node) -> Iterator[tuple[str, Any, Any, bool]]:
    """Key, holder and name of each path in the tree, and whether it is of something to be read."""
    for key in (*_MADE, *_READ):
        *sections, name = key.split(".")
        holder = tree
        for section in sections:
            holder = holder.value.get(section, Node({}, "")) if isinstance(holder.value, dict) else Node({}, "")
        if isinstance(holder.value, dict) and name in holder.value:
            yield key, holder.value, name, key in _READ
    data = tree.value.get("data") if isinstance(tree.value, dict) else None
    sources = data.value.get("sources") if data is not None and isinstance(data.value, dict) else None
    for index, source in enumerate(sources.value if sources is not None and isinstance(sources.value, list) else []):
        if isinstance(source.value, dict) and "path" in source.value:
            yield f"data.sources.{index}.path", source.value, "path", True


def expand_path(key: str, path: str, where: str, problems: list[str]) -> str:
    """Return a path of a config with what `~` and variables stand for here; `key` and `where` are for messages."""

    def value_of(match: re.Match[str]) -> str:
        name = match[2] or match[3]
        if match[1]:
            return "$"
        if name in os.environ:
            return os.environ[name]
        unset.append(name)
        if key in _MADE:  # a folder of the variable's name would be made
            problems.append(
                f"{key}: the environment has no variable {name}, which is in {path!r}; set it, or write $$ for a "
                f"dollar sign ({where})"
            )
        return match[0]

    unset: list[str] = []
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        problems.append(f"{key}: there is no user {path.partition('/')[0]!r}; write ./{path} for a file ({where})")
    expanded = _VARIABLE.sub(value_of, expanded)
    if unset:
        _unset[expanded] = tuple(unset)
    return expanded


def _beside(path: str, where: str) -> str:
    """The path beside the file that `where` (`FILE:LINE`) names, if something is there, or some file matches it.

    Where that file is a link, beside what it leads to as well.
    """
    file = Path(where.rpartition(":")[0])
    folders = dict.fromkeys((file.parent, Path(os.path.realpath(file)).parent))
    places = [path if folder == Path() else os.path.normpath(folder / path) for folder in folders]
    for beside in places:
        if may_be_there(beside) or (glob.has_magic(path) and _matches(Path(beside))):
            return beside
    _lost[path] = tuple(places)
    return path


def may_be_there(path: str | Path) -> bool:
    """Whether something is at a path, or may be: in a folder that cannot be searched, which reading it will say."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EPERM)
    return True


def unset_in(path: str) -> str:
    """For a message: which variables in a path that leads to nothing the environment has not; empty without any."""
    names = [name for name in _unset.get(path, ()) if name not in os.environ]
    return f" (the environment has no variable {' and no '.join(dict.fromkeys(names))})" if names else ""


def places_of_lost(path: str) -> tuple[str, ...]:
    """Where a path that leads to nothing may have led, absolute: here, and beside the file that said it."""
    return tuple(dict.fromkeys(os.path.abspath(place) for place in (path, *_lost.get(path, ()))))


def _matches(pattern: Path) -> bool:
    """Whether something matches, or may match in a folder that cannot be listed, as is said where it is read."""
    try:
        return any(any(expand_glob(one)) for one in (pattern, literal_start(pattern)))
    except OSError:
        return True


def expand_glob(pattern: Path, below: Callable[[Path], Iterator[str]] | None = None) -> Iterator[str]:
    """Yield what a glob matches, as `glob.iglob` does, which passes over a folder that cannot be listed.

    Args:
        pattern: a path with `*`, `?`, `[...]` and `**`.
        below: gives a folder and all folders below it, for `**`.

    Raises:
        OSError: a folder that is there cannot be listed or searched; it has the folder's name.
    """
    yield from _expand(pattern.anchor, pattern.parts[1:] if pattern.anchor else pattern.parts, below or _below)


def _expand(folder: str, parts: tuple[str, ...], below: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for deeper in below(Path(folder)) if os.path.isdir(folder) else ():
            yield from _expand(deeper, rest or ("*",), below)
        return
    literal = re.sub(r"\[([*?[])\]", r"\1", part)
    names = [literal] if glob.escape(literal) == part else _listed(folder, part)
    for name in names:
        path = os.path.join(folder, name)
        with _nothing_there():
            os.stat(path) if rest else os.lstat(path)
            yield from _expand(path, rest, below)


def _listed(folder: str, part: str) -> list[str]:
    """The names in a folder that match one part of a glob; those that are hidden for a part that says so only."""
    names: list[str] = []
    with _nothing_there():
        names = os.listdir(folder or os.curdir)
    return sorted(name for name in fnmatch.filter(names, part) if part.startswith(".") or not name.startswith("."))


@contextmanager
def _nothing_there() -> Iterator[None]:
    """Pass over a path that leads nowhere, or into a file as if that were a folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise


def _below(folder: Path) -> Iterator[str]:
    for path, subfolders, _ in os.walk(folder, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield path


def _raise(error: OSError) -> None:
    raise error


def literal_start(pattern: Path) -> Path:
    """Escape the beginning of a glob that exists as it is written, such as a folder called `data [v1]`."""
    start = Path()
    for part in pattern.parts:
        if not os.path.exists(start / part):  # of a folder that cannot be searched, pathlib raises
            break
        start /= part
    return Path(glob.escape(str(start)), *pattern.parts[len(start.parts) :])
