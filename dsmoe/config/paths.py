"""Paths in a config: one rule of expansion and search for every key that holds a path, and globs."""

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

_WRITTEN_KEYS = ("runs_dir", "data.cache_dir")
"""Keys of folders that dsmoe makes."""
_READ_KEYS = ("cluster.hostfile", "data.tokenizer", "checkpoint.resume", "checkpoint.weights_from")
"""Keys of files and folders that have to exist."""
PATH_KEYWORDS = {"data.tokenizer": ("bytes",), "checkpoint.resume": ("auto", "always", "never")}
"""Values of path keys that are no paths."""
BUILTIN = "builtin:"
_SOURCE = re.compile(r"data\.sources\.\d+\.path")
_missing_paths: dict[str, tuple[str, ...]] = {}
"""Places beside the YAML file that were searched in vain, by the relative path."""
_unset_variables: dict[str, tuple[str, ...]] = {}
"""Names of variables that were unset when a path was expanded, by the expanded path."""
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
"""`$$` stands for a dollar sign."""


def resolve_paths(tree: Node, problems: list[str]) -> None:
    """Replace the paths in a config's tree by expanded ones.

    `~`, `$NAME` and `${NAME}` are expanded; a dollar sign before an unset name stays, as part of a file name. A
    relative path that is read is searched beside the YAML file that has it, then in the working directory; a path from
    the command line in the working directory only. Folders that dsmoe makes are made in the working directory. With
    `conf/a.yaml`, HOME=/home/u, and the file `conf/t.json`:

        data.tokenizer: t.json               conf/t.json
        data.tokenizer: other.json           other.json, in the working directory
        data.cache_dir: ~/cache              /home/u/cache
        runs_dir: runs                       runs, in the working directory
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


def variables_in(path: str) -> list[str]:
    """Return the names of the variables in a path of a config, set or not."""
    return [match[2] or match[3] for match in _VARIABLE.finditer(path) if match[1] is None]


def depends_on_host(path: str) -> bool:
    """Return whether the expansion of a path depends on the user or the environment."""
    return path.startswith("~") or bool(variables_in(path))


def paths_as_written(tree: Node) -> dict[str, str]:
    """Return the unexpanded text of each path in a config, by its key."""
    values = {key: holder[slot].value for key, holder, slot, _ in _paths(tree)}
    return {key: value for key, value in values.items() if _is_path(key, value)}


def write_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Escape the paths in a config's values with `literal_path`, so that loading the values gives the same paths."""
    for key in (*_WRITTEN_KEYS, *_READ_KEYS):
        section, _, name = key.rpartition(".")
        holder = tree[section] if section else tree
        if isinstance(holder[name], str):
            holder[name] = literal_path(holder[name])
    for source in tree["data"]["sources"]:
        if isinstance(source["path"], str):
            source["path"] = literal_path(source["path"])
    return tree


def literal_path(path: str) -> str:
    """Escape a path, so that loading expands neither variables nor a home in it: `~a/$B` becomes `./~a/$$B`."""
    path = f"./{path}" if path.startswith("~") else path
    return _VARIABLE.sub(lambda match: f"$${match[0][1:]}" if match[1] is None else "$$$$", path)


def is_path(key: str, value: Any) -> bool:
    """Return whether a value of a flattened config is a path; two spellings of a path may name the same file."""
    return (key in (*_WRITTEN_KEYS, *_READ_KEYS) or _SOURCE.fullmatch(key) is not None) and _is_path(key, value)


def _is_path(key: str, value: Any) -> bool:
    return isinstance(value, str) and value not in PATH_KEYWORDS.get(key, ()) and not value.startswith(BUILTIN)


def _paths(tree: Node) -> Iterator[tuple[str, Any, Any, bool]]:
    """Yield (key, value of the parent node, name in the parent, whether the path is read) of each path in the tree."""
    for key in (*_WRITTEN_KEYS, *_READ_KEYS):
        *sections, name = key.split(".")
        holder = tree
        for section in sections:
            holder = holder.value.get(section, Node({}, "")) if isinstance(holder.value, dict) else Node({}, "")
        if isinstance(holder.value, dict) and name in holder.value:
            yield key, holder.value, name, key in _READ_KEYS
    data = tree.value.get("data") if isinstance(tree.value, dict) else None
    sources = data.value.get("sources") if data is not None and isinstance(data.value, dict) else None
    for index, source in enumerate(sources.value if sources is not None and isinstance(sources.value, list) else []):
        if isinstance(source.value, dict) and "path" in source.value:
            yield f"data.sources.{index}.path", source.value, "path", True


def expand_path(key: str, path: str, where: str, problems: list[str]) -> str:
    """Return a path of a config with `~` and variables expanded; `key` and `where` are for messages."""

    def value_of(match: re.Match[str]) -> str:
        name = match[2] or match[3]
        if match[1]:
            return "$"
        if name in os.environ:
            return os.environ[name]
        unset.append(name)
        if key in _WRITTEN_KEYS:  # else dsmoe would make a folder with the name of the variable
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
        _unset_variables[expanded] = tuple(unset)
    return expanded


def _beside(path: str, where: str) -> str:
    """Return the path beside the YAML file of `where` (`FILE:LINE`) if it exists or matches as a glob, else `path`.

    If the YAML file is a link, the folder of its target is searched as well.
    """
    file = Path(where.rpartition(":")[0])
    folders = dict.fromkeys((file.parent, Path(os.path.realpath(file)).parent))
    places = [path if folder == Path() else os.path.normpath(folder / path) for folder in folders]
    for beside in places:
        if may_exist(beside) or (glob.has_magic(path) and _matches(Path(beside))):
            return beside
    _missing_paths[path] = tuple(places)
    return path


def may_exist(path: str | Path) -> bool:
    """Return whether a path exists, or may exist in a folder without permission to search, which reading reports."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EPERM)
    return True


def unset_variables_note(path: str) -> str:
    """Return the end of a message on a missing path: the unset variables in it; empty without any."""
    names = [name for name in _unset_variables.get(path, ()) if name not in os.environ]
    return f" (the environment has no variable {' and no '.join(dict.fromkeys(names))})" if names else ""


def candidate_paths(path: str) -> tuple[str, ...]:
    """Return the absolute places where a missing path was searched: in the working directory and beside its file."""
    return tuple(dict.fromkeys(os.path.abspath(place) for place in (path, *_missing_paths.get(path, ()))))


def _matches(pattern: Path) -> bool:
    """Return whether a glob matches, or may match in a folder without permission to list, which reading reports."""
    try:
        return any(any(expand_glob(one)) for one in (pattern, literal_start(pattern)))
    except OSError:
        return True


def expand_glob(pattern: Path, below: Callable[[Path], Iterator[str]] | None = None) -> Iterator[str]:
    """Yield the matches of a glob like `glob.iglob`, but raise for a folder that cannot be listed.

    Args:
        pattern: a path with `*`, `?`, `[...]` and `**`.
        below: yields a folder and all folders below it, for `**`.

    Raises:
        OSError: an existing folder cannot be listed or searched; with the folder's name.
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
        with _ignore_missing():
            os.stat(path) if rest else os.lstat(path)
            yield from _expand(path, rest, below)


def _listed(folder: str, part: str) -> list[str]:
    """Return the names in a folder that match one part of a glob; hidden names only if the part begins with a dot."""
    names: list[str] = []
    with _ignore_missing():
        names = os.listdir(folder or os.curdir)
    return sorted(name for name in fnmatch.filter(names, part) if part.startswith(".") or not name.startswith("."))


@contextmanager
def _ignore_missing() -> Iterator[None]:
    """Suppress the errors of a path that does not exist or goes through a file."""
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
    """Escape the longest beginning of a glob that exists literally, such as a folder called `data [v1]`."""
    start = Path()
    for part in pattern.parts:
        if not os.path.exists(start / part):  # pathlib would raise for a folder without permission to search
            break
        start /= part
    return Path(glob.escape(str(start)), *pattern.parts[len(start.parts) :])
