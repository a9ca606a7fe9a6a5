"""Loading: from a YAML file, its includes and the command line's overrides to one checked `Config`.

Loading does not stop at the first mistake: duplicate keys, wrong overrides, unknown or mistyped keys, and
contradictions between the valid keys are reported together.
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
from dsmoe.config.partial_config import valid_part
from dsmoe.config.paths import expand_path, resolve_paths
from dsmoe.config.schema import Config
from dsmoe.config.validation_messages import explain
from dsmoe.config.yaml_text import (
    COMMAND_LINE,
    MAX_DEPTH,
    MOST_CHARACTERS,
    SHORTEN_ADVICE,
    Node,
    fewest_characters,
    lookup,
    parse_yaml,
    plain,
    show_value,
    too_long,
)

_MOST_FILES = 64
"""The most files that one config may include; a file that is included twice counts twice."""


ConfigCheck = Callable[[Any], list[Problem]]
"""Finds problems outside of the config, such as missing files; takes a `Config` or a `valid_part` of one."""


def load_config(path: str | Path, overrides: Iterable[str] = (), *checks: ConfigCheck) -> Config:
    """Return the configuration in the file at `path`, with `section.key=value` overrides on top.

    Mappings of the file and of its includes are merged key by key; lists, scalars and null replace:

        base.yaml                       model: {hidden_size: 64, num_heads: 4}
        a.yaml, including base.yaml     model: {num_heads: 8}
        override                        model.num_layers=2
        result                          model: {hidden_size: 64, num_heads: 8, num_layers: 2}

    A loaded config can be dumped and loaded again, as run folders do.

    Args:
        path: the YAML file.
        overrides: `section.key=value` each.
        checks: further checks whose problems are reported with the others, such as `input_problems`.

    Raises:
        ConfigError: lists every problem with its key, file and line.
    """
    tree, problems = read_tree(path, overrides)
    config = _validate(tree, problems, checks, f"{path}, written out with its defaults")
    if config is None or problems:
        raise ConfigError(problems, str(path))
    return config


def read_tree(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Node, list[str]]:
    """Return the merged tree of a file and the overrides, not yet validated, and the problems so far.

    Raises:
        ConfigError: the file or an include cannot be read.
    """
    tree, problems = read_as_written(path, overrides)
    resolve_paths(tree, problems)
    return tree, problems


def read_as_written(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Node, list[str]]:
    """Return the same as `read_tree`, but with paths as written in the files and overrides, not expanded."""
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
    if tree is None:  # reports of missing keys would mislead without the complete text
        raise ConfigError(problems, str(path))
    for override in overrides:
        problem = _apply_override(tree, override, problems)
        if problem:
            problems.append(f"{problem} ({COMMAND_LINE})")
    return tree, problems


def included_files(path: Path) -> list[tuple[str, Path]]:
    """Return all includes of the file at `path`, which `load_config` has read: each as written, and as a path."""
    root = parse_yaml(path.read_text("utf-8-sig"), str, [])
    assert root is not None
    entries = _include_entries(root.value.get("include", Node([], "")), []) or []
    files = [(entry.value, _included(entry, path, [])) for entry in entries]
    return [found for text, file in files for found in [(text, file), *included_files(file)]]


def _validate(tree: Node, problems: list[str], checks: Iterable[ConfigCheck], written: str) -> Config | None:
    """Return the config, or None if a key is wrong by itself; add contradictions to `problems`.

    Args:
        tree: the merged tree.
        problems: the problems so far.
        checks: run last, and not at all for a config that is too long to be dumped, because it may name thousands of
            files.
        written: place in messages of the config as dumped into a run's folder, with all defaults.
    """
    config: Any = None
    try:
        complete = config = Config.model_validate(plain(tree))
    except ValidationError as error:
        problems += explain(error, tree)
        complete, config = None, valid_part(plain(tree), error)
    if complete is not None and not problems and not _can_be_written(complete, written, problems):
        checks = ()
    found = cross_field_problems(config) + [problem for check in checks for problem in check(config)]
    problems += [f"{message} ({lookup(tree, key.split('.')).where})" for key, message in found]
    return complete


def _can_be_written(config: Config, place: str, problems: list[str]) -> bool:
    """Return whether a config can be read again after it has been dumped; add the reason to `problems` if not."""
    fewest = fewest_characters(config.model_dump())
    if fewest > MOST_CHARACTERS:
        problems.append(f"{too_long(fewest)} ({place})")
    else:
        parse_yaml(dump_config(config), lambda _: place, problems)
    return not problems


class _Reader:
    """Reads a file and all its includes."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        self.files = 0
        self.characters = 0

    def read(self, path: Path, including: tuple[Path, ...], origin: str) -> Node | None:
        """Return the file's mapping merged over its includes; None if any of them cannot be read as a mapping.

        Args:
            path: the file.
            including: the chain of files that include this one.
            origin: end of a message: the line that includes this file; empty for the first.
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
        root.where = str(path)  # a key missing at the top level is reported for the file, not for its first line
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
        """Count a file and its characters, and note a problem above the limits: includes can grow exponentially."""
        if self.files > _MOST_FILES or self.characters > MOST_CHARACTERS:
            return False  # reported already
        self.files += 1
        self.characters += len(text)
        if self.files <= _MOST_FILES and self.characters <= MOST_CHARACTERS:
            return True
        self.problems.append(
            f"no config is so long: with {path} it has {self.files} files and {self.characters:,} characters, and "
            f"{_MOST_FILES} and {MOST_CHARACTERS:,} are the most; {SHORTEN_ADVICE}{origin}"
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
    # Path.resolve and Path.exists would raise for circular links, long names and folders without permission; os.path
    # leaves the report to the reading of the file.
    folders = (path.parent, os.path.dirname(os.path.realpath(path)))
    beside, beside_target = (Path(os.path.normpath(os.path.join(folder, name))) for folder in folders)
    return beside if os.path.exists(beside) or not os.path.exists(beside_target) else beside_target


def _merge(base: Node, top: Node) -> Node:
    """Return `top` merged over `base`: mappings key by key, everything else replaced."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    children = dict(base.value)
    for key, child in top.value.items():
        children[key] = _merge(children[key], child) if key in children else child
    return Node(children, top.where)


def _apply_override(tree: Node, override: str, problems: list[str]) -> str | None:
    """Put one `section.key=value` into the tree; return the problem with it, if any.

    The value is YAML, and numbers are entries of a list:

        moe.top_k=4                     tree["moe"]["top_k"] = 4
        data.sources.1.weight=0.5       tree["data"]["sources"][1]["weight"] = 0.5, if there is a second source
        moe=null                        tree["moe"] = None
        optimizer.betas=[0.9, 0.99]     replaces the whole list
        name.first=a                    refused if `name` is a word: "cannot be set, because ..."
    """
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals:
        return f"'{override}': an override is written section.key=value, for example {key or 'moe.top_k'}=4"
    path = key.split(".")
    if not all(path):
        return f"'{override}': an override is written section.key=value, without empty names"
    if len(path) > MAX_DEPTH:
        return f"'{override[:60]}...': no key has so many parts: {len(path):,}, and {MAX_DEPTH} are the most"
    if not text:
        return f"'{override}': the value is missing; write {key}=null for null"
    value = parse_yaml(text, lambda line: COMMAND_LINE, problems, key)
    return None if value is None else _assign(tree, path, value, "")


def _assign(holder: Node, path: list[str], value: Node, holder_path: str) -> str | None:
    """Put `value` at `path` below `holder`, whose own path is `holder_path`; return the problem, if any."""
    part, *rest = path
    full_path = f"{holder_path}.{part}" if holder_path else part
    if holder.value is None:
        holder.value, holder.where = {}, COMMAND_LINE
    children: Any = holder.value
    slot: str | int = part
    if isinstance(children, list):
        if not part.isdecimal() or int(part) >= len(children):
            return f"{full_path}: no such entry; {holder_path} has {len(children)}, counted from 0"
        slot = int(part)
    elif not isinstance(children, dict):
        return f"{full_path}: cannot be set, because {holder_path} is {show_value(children)} and not a section"
    elif rest:
        children.setdefault(part, Node(None, COMMAND_LINE))
    if rest:
        return _assign(children[slot], rest, value, full_path)
    children[slot] = value
    return None
