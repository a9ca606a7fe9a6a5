"""From a YAML file, what it includes and the command line's overrides to one checked `Config`.

Nothing stops at the first mistake: duplicate keys, wrong overrides, unknown or mistyped keys are reported together,
and the checks across keys as soon as every key is right by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsmoe.config.checks import cross_field_problems
from dsmoe.config.errors import ConfigError
from dsmoe.config.explain import explain
from dsmoe.config.schema import Config
from dsmoe.config.yaml_text import COMMAND_LINE, Node, lookup, parse_yaml, plain, show_value


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the configuration in the file at `path`, with `section.key=value` overrides on top.

    Mappings of the file and of what it includes are merged key by key; lists, scalars and null replace.
    Raises `ConfigError`, which lists every problem with its key, file and line.
    """
    problems: list[str] = []
    tree = _read_file(Path(path), (), "", problems)
    if tree is None:  # without all of the text, complaints about missing keys would mislead
        raise ConfigError(problems, str(path))
    for override in overrides:
        problem = _apply_override(tree, override, problems)
        if problem:
            problems.append(f"{problem} ({COMMAND_LINE})")
    config = _validate(tree, problems)
    if config is None or problems:
        raise ConfigError(problems, str(path))
    return config


def config_files(path: Path) -> list[Path]:
    """The file at `path` and all that it includes, of which `load_config` has made a config."""
    root = parse_yaml(path.read_text("utf-8-sig"), str, [])
    assert root is not None
    entries = _include_entries(root.value.get("include", Node([], "")), []) or []
    return [path, *(file for entry in entries for file in config_files(_included(entry, path)))]


def _validate(tree: Node, problems: list[str]) -> Config | None:
    try:
        config = Config.model_validate(plain(tree))
    except ValidationError as error:
        problems += explain(error, tree)
        return None
    for key, message in cross_field_problems(config):
        problems.append(f"{message} ({lookup(tree, key.split('.')).where})")
    return config


def _read_file(path: Path, including: tuple[Path, ...], origin: str, problems: list[str]) -> Node | None:
    """Return the file's mapping over those it includes; None if any of them is not a mapping that can be read.

    `including` are the files on the way here, `origin` says in messages which line asked for this one.
    """
    text = _read_text(path, origin, problems)
    if text is None:
        return None
    root = parse_yaml(text, lambda line: f"{path}:{line}", problems)
    if root is None:
        return None
    if root.value is None:
        problems.append(f"the file is empty: {path}{origin}")
        return None
    if not isinstance(root.value, dict):
        problems.append(f"expected a mapping of keys, got {show_value(plain(root))} ({root.where})")
        return None
    root.where = str(path)  # what is missing at the top level is missing in the file, not in its first line
    include = root.value.pop("include", Node([], root.where))
    entries = _include_entries(include, problems)
    if entries is None:
        return None
    merged = Node({}, root.where)
    for base in [_read_include(entry, path, including, problems) for entry in entries]:
        if base is None:
            return None
        merged = _merge(merged, base)
    return _merge(merged, root)


def _read_text(path: Path, origin: str, problems: list[str]) -> str | None:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        problems.append(f"no such file: {path}{origin}")
    except IsADirectoryError:
        problems.append(f"expected a YAML file, got a directory: {path}{origin}")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(f"not UTF-8 text: byte 0x{data[error.start]:02x} ({path}:{line})")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        problems.append(f"cannot be read: {path}: {reason}{origin}")
    return None


def _include_entries(include: Node, problems: list[str]) -> list[Node] | None:
    entries = include.value if isinstance(include.value, list) else [include]
    if all(isinstance(entry.value, str) and "\0" not in entry.value for entry in entries):
        return entries
    got = show_value(plain(include))
    problems.append(f"include: expected a file name or a list of file names, got {got} ({include.where})")
    return None


def _read_include(entry: Node, path: Path, including: tuple[Path, ...], problems: list[str]) -> Node | None:
    chain = (*including, path)
    included = _included(entry, path)
    if any(included.resolve() == file.resolve() for file in chain):
        cycle = " -> ".join(map(str, (*chain, included)))
        problems.append(f"include: a file must not include itself: {cycle} ({entry.where})")
        return None
    return _read_file(included, chain, f" (included at {entry.where})", problems)


def _included(entry: Node, path: Path) -> Path:
    return Path(os.path.normpath(path.parent / entry.value))


def _merge(base: Node, top: Node) -> Node:
    """Return `top` over `base`: mappings key by key, everything else replaces."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    children = dict(base.value)
    for key, child in top.value.items():
        children[key] = _merge(children[key], child) if key in children else child
    return Node(children, top.where)


def _apply_override(tree: Node, override: str, problems: list[str]) -> str | None:
    """Put one `section.key=value` into the tree; the answer is what is wrong with it, if anything."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals:
        return f"'{override}': an override is written section.key=value, for example {key or 'moe.top_k'}=4"
    path = key.split(".")
    if not all(path):
        return f"'{override}': an override is written section.key=value, without empty names"
    if not text:
        return f"'{override}': the value is missing; write {key}=null for null"
    value = parse_yaml(text, lambda line: COMMAND_LINE, problems, key)
    return None if value is None else _assign(tree, path, value, "")


def _assign(holder: Node, path: list[str], value: Node, done: str) -> str | None:
    """Put `value` at `path` below `holder`, whose own path is `done`; the answer is what is in the way, if anything."""
    part, *rest = path
    here = f"{done}.{part}" if done else part
    if holder.value is None:
        holder.value, holder.where = {}, COMMAND_LINE
    children: Any = holder.value
    slot: str | int = part
    if isinstance(children, list):
        if not part.isdecimal() or int(part) >= len(children):
            return f"{here}: no such entry; {done} has {len(children)}, counted from 0"
        slot = int(part)
    elif not isinstance(children, dict):
        return f"{here}: cannot be set, because {done} is {show_value(children)} and not a section"
    elif rest:
        children.setdefault(part, Node(None, COMMAND_LINE))
    if rest:
        return _assign(children[slot], rest, value, here)
    children[slot] = value
    return None
