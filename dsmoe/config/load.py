"""From a YAML file, what it includes and the command line's overrides to one checked `Config`.

Nothing stops at the first mistake: duplicate keys, wrong overrides, unknown or mistyped keys are reported together, and
what contradicts itself among the keys that are right.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsmoe.config.cross_field_checks import cross_field_problems
from dsmoe.config.dump import dump_config
from dsmoe.config.errors import ConfigError, Problem
from dsmoe.config.partial_config import sound_part
from dsmoe.config.paths import expand_path, resolve_paths
from dsmoe.config.schema import Config
from dsmoe.config.validation_messages import explain
from dsmoe.config.yaml_text import (
    COMMAND_LINE,
    DEEPEST,
    LESS,
    MOST_CHARACTERS,
    Node,
    fewest_characters,
    lookup,
    parse_yaml,
    plain,
    show_value,
    too_long,
)

_MOST_FILES = 64
"""That one config may include, counted as often as they are."""


Look = Callable[[Any], list[Problem]]
"""Finds what is wrong outside of a config; of keys that are wrong, or missing, reading raises UnsoundError."""


def load_config(path: str | Path, overrides: Iterable[str] = (), *looks: Look) -> Config:
    """Return the configuration in the file at `path`, with `section.key=value` overrides on top.

    Mappings of the file and of what it includes are merged key by key; lists, scalars and null replace. What the
    `looks` find is a problem as well: `input_problems`, for files that the configuration names and that are not there.
    What was loaded can be dumped and loaded again, as run folders do.
    Raises `ConfigError`, which lists every problem with its key, file and line.
    """
    tree, problems = read_tree(path, overrides)
    config = _validate(tree, problems, looks, f"{path}, written out with its defaults")
    if config is None or problems:
        raise ConfigError(problems, str(path))
    return config


def read_tree(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Node, list[str]]:
    """Return what a file and the overrides say, before it is compared with the schema, and what is wrong so far.

    Raises:
        ConfigError: some of it cannot be read.
    """
    tree, problems = read_as_written(path, overrides)
    resolve_paths(tree, problems)
    return tree, problems


def read_as_written(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Node, list[str]]:
    """Like `read_tree`, with paths as the files and the overrides have them: nothing in them is expanded."""
    problems: list[str] = []
    overrides = list(overrides)
    if sum(map(len, overrides)) > MOST_CHARACTERS:
        raise ConfigError(
            [
                f"no overrides are so long: at most {MOST_CHARACTERS:,} characters; put them into the file "
                f"({COMMAND_LINE})"
            ],
            str(path),
        )
    tree = _Reader(problems).read(Path(path), (), "")
    if tree is None:  # without all of the text, complaints about missing keys would mislead
        raise ConfigError(problems, str(path))
    for override in overrides:
        problem = _apply_override(tree, override, problems)
        if problem:
            problems.append(f"{problem} ({COMMAND_LINE})")
    return tree, problems


def included_files(path: Path) -> list[tuple[str, Path]]:
    """All that the file at `path`, which `load_config` has read, includes: as it is written, and the file."""
    root = parse_yaml(path.read_text("utf-8-sig"), str, [])
    assert root is not None
    entries = _include_entries(root.value.get("include", Node([], "")), []) or []
    files = [(entry.value, _included(entry, path, [])) for entry in entries]
    return [found for text, file in files for found in [(text, file), *included_files(file)]]


def _validate(tree: Node, problems: list[str], looks: Iterable[Look], written: str) -> Config | None:
    """Return the config, with what contradicts itself added to `problems`; None where a key is wrong by itself.

    `written` is the place that messages give for the config as a run's folder will have it, with all defaults. The
    `looks` come last, and not at all at one that is too long for that: it may name thousands of files.
    """
    config: Any = None
    try:
        whole = config = Config.model_validate(plain(tree))
    except ValidationError as error:
        problems += explain(error, tree)
        whole, config = None, sound_part(plain(tree), error)
    if whole is not None and not problems and not _can_be_written(whole, written, problems):
        looks = ()
    found = cross_field_problems(config) + [problem for look in looks for problem in look(config)]
    problems += [f"{message} ({lookup(tree, key.split('.')).where})" for key, message in found]
    return whole


def _can_be_written(config: Config, place: str, problems: list[str]) -> bool:
    """Whether what a run's folder holds of a config can be read again; else that is a problem."""
    fewest = fewest_characters(config.model_dump())
    if fewest > MOST_CHARACTERS:
        problems.append(f"{too_long(fewest)} ({place})")
    else:
        parse_yaml(dump_config(config), lambda _: place, problems)
    return not problems


class _Reader:
    """Reads a file and all that it includes."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        self.files = 0
        self.characters = 0

    def read(self, path: Path, including: tuple[Path, ...], origin: str) -> Node | None:
        """Return the file's mapping over those it includes; None if any of them is not a mapping that can be read.

        `including` are the files on the way here, `origin` says in messages which line asked for this one.
        """
        problems = self.problems
        text = _read_text(path, origin, problems)
        if text is None or not self.is_within_limits(path, text, origin):
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
        for base in [self.read_include(entry, path, including) for entry in entries]:
            if base is None:
                return None
            merged = _merge(merged, base)
        return _merge(merged, root)

    def read_include(self, entry: Node, path: Path, including: tuple[Path, ...]) -> Node | None:
        """Return the mapping of a file that `path` includes."""
        chain = (*including, path)
        before = len(self.problems)
        included = _included(entry, path, self.problems)
        if len(self.problems) > before:
            return None
        if any(os.path.realpath(included) == os.path.realpath(file) for file in chain):
            cycle = " -> ".join(map(str, (*chain, included)))
            self.problems.append(f"include: a file must not include itself: {cycle} ({entry.where})")
            return None
        if os.path.exists(included) and not os.path.isfile(included) and not os.path.isdir(included):
            self.problems.append(f"include: {included} is not a file ({entry.where})")
            return None
        return self.read(included, chain, f" (included at {entry.where})")

    def is_within_limits(self, path: Path, text: str, origin: str) -> bool:
        """Count a file, and note a problem if it is one too many: files may include each other twice each."""
        if self.files > _MOST_FILES or self.characters > MOST_CHARACTERS:
            return False  # and that has been said
        self.files += 1
        self.characters += len(text)
        if self.files <= _MOST_FILES and self.characters <= MOST_CHARACTERS:
            return True
        self.problems.append(
            f"no config is so long: with {path} it has {self.files} files and {self.characters:,} characters, and "
            f"{_MOST_FILES} and {MOST_CHARACTERS:,} are the most; {LESS}{origin}"
        )
        return False


def _read_text(path: Path, origin: str, problems: list[str]) -> str | None:
    data = b""
    try:
        with path.open("rb") as stream:
            data = stream.read(4 * MOST_CHARACTERS + 1)  # a device may have no end
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


def _included(entry: Node, path: Path, problems: list[str]) -> Path:
    name = expand_path("include", entry.value, entry.where, problems)
    # Not Path.resolve and Path.exists, which raise for links that go round, long names and folders without permission:
    # reading the file says what is wrong.
    folders = (path.parent, os.path.dirname(os.path.realpath(path)))
    beside, beside_target = (Path(os.path.normpath(os.path.join(folder, name))) for folder in folders)
    return beside if os.path.exists(beside) or not os.path.exists(beside_target) else beside_target


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
    if len(path) > DEEPEST:
        return f"'{override[:60]}...': no key has so many parts: {len(path):,}, and {DEEPEST} are the most"
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
