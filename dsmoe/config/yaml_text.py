"""YAML reader and writer: numbers as people write them, no duplicate keys, and the place of every value.

PyYAML implements YAML 1.1, in which `1e-4` is a string, `no` is false, `010` is 8 and `12:30` is 750. Here numbers
are decimal (`3e-4`, `1E6`, `1_000_000`), only true and false are booleans, and everything else is text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.emitter import Emitter
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.representer import SafeRepresenter
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner
from yaml.serializer import Serializer

COMMAND_LINE = "command line"
"""The place of a value that an override set."""

MOST_CHARACTERS = 1 << 18
"""The most text of one config with its includes; the slowest text of this size takes a second to read."""
SHORTEN_ADVICE = "one source can read many files (path: data/*.jsonl)"
"""Remedy for a config that is too large."""
_MOST_NODES = 20_000
"""The most values of one file, with repetitions by aliases: nine levels of nine aliases each are 9^9 values."""
MAX_DEPTH = 50
"""The most levels of nesting, and parts of an override's key."""
_TAG = "tag:yaml.org,2002:"
_DIGITS = r"[0-9]+(?:_[0-9]+)*"


@dataclass
class Node:
    """A scalar, a list or a mapping of nodes, and its place: `file:line`, a file, or `COMMAND_LINE`."""

    value: Any
    where: str


def plain(node: Node) -> Any:
    """Return the node's value without places, as plain dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def lookup(node: Node, path: Sequence[str | int]) -> Node:
    """Return the node at `path`, or its nearest existing ancestor."""
    for part in path:
        children = node.value
        if isinstance(children, list):
            index = int(part)
            if index >= len(children):
                return node
            node = children[index]
        elif isinstance(children, dict) and part in children:
            node = children[str(part)]
        else:
            return node
    return node


def show_value(value: Any) -> str:
    """Return a value as one short line for a message: text in double quotes, null, true, numbers unchanged."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    if isinstance(value, str):
        value = value[:100]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class _Resolver(BaseResolver):
    """Types of unquoted words; shared by reader and writer, so that written values are read back equal."""


for _kind, _pattern in {
    "null": r"(?:~|null|Null|NULL|)\Z",
    "bool": r"(?:true|True|TRUE|false|False|FALSE)\Z",
    "int": r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)\Z",
    "float": rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS}|{_DIGITS}(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z",
}.items():
    _Resolver.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), None)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """Parser from text to a graph of YAML nodes; without a constructor, so that nothing in a file can be executed."""

    composed = 0

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.composed += 1
        if self.composed > 2 * _MOST_NODES:  # each value may have a key, which is a node as well
            raise _TooLargeError(self.peek_event().start_mark.line + 1)
        return super().compose_node(parent, index)


class _Dumper(Emitter, Serializer, SafeRepresenter, _Resolver):
    """Writer of plain values, without anchors."""

    def __init__(self, stream: Any, **options: Any) -> None:
        representing = {key: options.pop(key) for key in ("default_style", "default_flow_style", "sort_keys")}
        emitting = {key: options.pop(key) for key in ("canonical", "indent", "width", "allow_unicode", "line_break")}
        Emitter.__init__(self, stream, **emitting)
        Serializer.__init__(self, **options)
        SafeRepresenter.__init__(self, **representing)
        _Resolver.__init__(self)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # Quoted, because PyYAML writes rare line breaks unquoted by default and reads them back as spaces.
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def write_yaml(value: Any) -> str:
    """Return `value` (mappings, lists and scalars) as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def fewest_characters(value: Any, indentation: int = 0) -> int:
    """Return a lower bound on the characters that `write_yaml` makes of `value`, in a hundredth of the time."""
    if isinstance(value, dict):
        keys = sum(indentation + len(key) + len(": ") for key in value)
        return keys + sum(fewest_characters(child, indentation + 2) for child in value.values())
    if isinstance(value, list | tuple):
        return sum(fewest_characters(child, indentation) for child in value)
    return 1 + (len(value) if isinstance(value, str) else 1)  # 1 for the end of the line


def too_long(characters: int) -> str:
    """Return the message for a config that is too long, with the remedy."""
    return f"no config is so long: {characters:,} characters, and {MOST_CHARACTERS:,} are the most; {SHORTEN_ADVICE}"


def parse_yaml(text: str, place: Callable[[int], str], problems: list[str], prefix: str = "") -> Node | None:
    """Read one YAML document.

    Args:
        text: the document.
        place: returns the place for messages of a line number, counted from 1.
        problems: new problems are added to this list.
        prefix: start of the key paths in problems.

    Returns:
        The tree; `Node(None, ...)` for null or empty text; None if the text is not YAML at all.
    """
    if len(text) > MOST_CHARACTERS:
        problems.append(f"{too_long(len(text))} ({place(1)})")
        return None
    try:
        root = _Loader(text).get_single_node()
        if root is None:
            return Node(None, place(1))
        return _Builder(place, problems).build(root, prefix, _line(root))
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.append(f"not valid YAML: the character {chr(error.character)!r} is not allowed ({place(line)})")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reasons = ", ".join(filter(None, [error.context, error.problem]))
        problems.append(f"not valid YAML: {reasons} ({place(mark.line + 1 if mark else 1)})")
    except RecursionError:
        problems.append(f"not valid YAML: nested too deeply ({place(1)})")
    except _TooLargeError as error:
        problems.append(
            f"{prefix}{': ' if prefix else ''}no config has so many values: more than {_MOST_NODES:,} or "
            f"{MOST_CHARACTERS:,} characters with what aliases (*) repeat, or more than {MAX_DEPTH} levels deep; "
            f"{SHORTEN_ADVICE} ({place(error.args[0])})"
        )
    return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _read_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _read_text(text: str) -> str:
    text.encode()  # raises for half a surrogate pair, which YAML can spell but UTF-8 cannot encode
    return text


_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": int,
    _TAG + "float": _read_float,
    _TAG + "str": _read_text,
}


class _TooLargeError(Exception):
    """A file is too deep or has too many values; the argument is the line of the value above the limit."""


class _Builder:
    """Builder of the tree of `Node` from PyYAML's graph, which may have aliases."""

    def __init__(self, place: Callable[[int], str], problems: list[str]) -> None:
        self.place = place
        self.problems = problems
        self.open: set[yaml.Node] = set()
        self.nodes = 0
        self.characters = 0

    def build(self, node: yaml.Node, path: str, line: int) -> Node:
        """Return the tree below `node`; `line` is the node's line, or that of the key for an entry of a mapping."""
        if node in self.open:
            self.report(path, "the anchor contains itself", line)
            return Node(None, self.place(line))
        self.nodes += 1
        if self.nodes > _MOST_NODES or len(self.open) > MAX_DEPTH:
            raise _TooLargeError(line)
        self.open.add(node)
        value: Any = None
        if isinstance(node, yaml.ScalarNode):
            self.characters += len(node.value)
            if self.characters > MOST_CHARACTERS:
                raise _TooLargeError(line)
            value = self.scalar(node, path, line)
        elif node.tag not in (_TAG + "map", _TAG + "seq"):
            self.report(path, f"the tag {node.tag} is not supported", line)
        elif isinstance(node, yaml.MappingNode):
            value = self.mapping(node, path)
        else:
            value = [self.build(child, f"{path}.{i}", _line(child)) for i, child in enumerate(node.value)]
        self.open.remove(node)
        return Node(value, self.place(line))

    def scalar(self, node: yaml.ScalarNode, path: str, line: int) -> Any:
        """Return a scalar as None, bool, int, float or str."""
        if node.tag not in _SCALARS:
            self.report(path, f"the tag {node.tag} is not supported", line)
            return None
        try:
            return _SCALARS[node.tag](node.value)
        except (ValueError, KeyError):
            self.report(path, f"{show_value(node.value)} cannot be read as {node.tag.removeprefix(_TAG)}", line)
            return None

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        """Return a mapping whose keys are text; report duplicate keys."""
        children: dict[str, Node] = {}
        for key_node, child in node.value:
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.report(path, "a key must be a word", line)
                continue
            key = key_node.value
            key_path = f"{path}.{key}" if path else key
            if key in children:
                places = " and ".join(dict.fromkeys([children[key].where, self.place(line)]))
                self.problems.append(f"{key_path}: duplicate key ({places})")
            elif key == "<<":
                self.report(path, "merge keys (<<) are not supported; use include", line)
            else:
                children[key] = self.build(child, key_path, line)
        return children

    def report(self, path: str, text: str, line: int) -> None:
        """Add a problem of the value at `path`, or of the whole text if `path` is empty."""
        self.problems.append(f"{path}: {text} ({self.place(line)})" if path else f"{text} ({self.place(line)})")
