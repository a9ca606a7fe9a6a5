"""The YAML that dsmoe reads and writes: numbers as people write them, no duplicate keys, every value with its place.

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
"""The place of what an override wrote."""

MOST_CHARACTERS = 1 << 18
"""The most text that one config may have, with all that it includes: reading the worst of that takes a second."""
LESS = "one source can read many files (path: data/*.jsonl)"
"""What to do about a config that is too large."""
_MOST_NODES = 20_000
"""The most values of one file, counted as often as an alias repeats them: nine aliases of nine each are 10^9."""
DEEPEST = 50
_TAG = "tag:yaml.org,2002:"
_DIGITS = r"[0-9]+(?:_[0-9]+)*"


@dataclass
class Node:
    """A scalar, a list or a mapping of nodes, and where it was written: `file:line`, a file, or `COMMAND_LINE`."""

    value: Any
    where: str


def plain(node: Node) -> Any:
    """Return the node's value without places, as YAML and JSON libraries would."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def lookup(node: Node, path: Sequence[str | int]) -> Node:
    """Return the node at `path`, or the last one on the way that exists."""
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
    """Return one short line for a value in a message: text in double quotes, null, true, numbers as they are."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    if isinstance(value, str):
        value = value[:100]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class _Resolver(BaseResolver):
    """Decides what an unquoted word is; reader and writer share it, so what is written is read back equal."""


for _kind, _pattern in {
    "null": r"(?:~|null|Null|NULL|)\Z",
    "bool": r"(?:true|True|TRUE|false|False|FALSE)\Z",
    "int": r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)\Z",
    "float": rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS}|{_DIGITS}(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z",
}.items():
    _Resolver.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), None)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """Text to a graph of YAML nodes; there is no constructor, so nothing in a file can be executed."""

    composed = 0

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.composed += 1
        if self.composed > 2 * _MOST_NODES:  # each value may have a key; the rest of the text need not be read
            raise _TooMuchError(self.peek_event().start_mark.line + 1)
        return super().compose_node(parent, index)


class _Dumper(Emitter, Serializer, SafeRepresenter, _Resolver):
    """Plain values to text, without anchors."""

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
        # Unless told otherwise, PyYAML writes the rarer line breaks as they are, and reads them back as spaces.
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def write_yaml(value: Any) -> str:
    """Return `value` (mappings, lists and scalars) as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def fewest_characters(value: Any, indentation: int = 0) -> int:
    """Return how many characters `write_yaml` makes of `value` at least, in a hundredth of the time."""
    if isinstance(value, dict):
        keys = sum(indentation + len(key) + len(": ") for key in value)
        return keys + sum(fewest_characters(child, indentation + 2) for child in value.values())
    if isinstance(value, list | tuple):
        return sum(fewest_characters(child, indentation) for child in value)
    return 1 + (len(value) if isinstance(value, str) else 1)  # and the end of the line


def too_long(characters: int) -> str:
    """Say that a config is longer than any, and what to do."""
    return f"no config is so long: {characters:,} characters, and {MOST_CHARACTERS:,} are the most; {LESS}"


def parse_yaml(text: str, place: Callable[[int], str], problems: list[str], prefix: str = "") -> Node | None:
    """Read one YAML document; `place` turns a line number (from 1) into what messages say.

    Problems are added to `problems`, with key paths that start with `prefix`. Returns null as `Node(None, ...)`,
    also for empty text, and None when the text is not YAML at all.
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
    except _TooMuchError as error:
        problems.append(
            f"{prefix}{': ' if prefix else ''}no config has so many values: more than {_MOST_NODES:,} or "
            f"{MOST_CHARACTERS:,} characters with what aliases (*) repeat, or more than {DEEPEST} levels deep; {LESS} "
            f"({place(error.args[0])})"
        )
    return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _read_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _read_text(text: str) -> str:
    text.encode()  # raises for half a surrogate pair, which YAML can spell but no file can hold
    return text


_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": int,
    _TAG + "float": _read_float,
    _TAG + "str": _read_text,
}


class _TooMuchError(Exception):
    """The line of the value that is too deep, or one too many."""


class _Builder:
    """YAML's graph to our tree."""

    def __init__(self, place: Callable[[int], str], problems: list[str]) -> None:
        self.place = place
        self.problems = problems
        self.open: set[yaml.Node] = set()
        self.nodes = 0
        self.characters = 0

    def build(self, node: yaml.Node, path: str, line: int) -> Node:
        """Return the tree below `node`, which `line` names (a mapping entry's line is its key's)."""
        if node in self.open:
            self.report(path, "the anchor contains itself", line)
            return Node(None, self.place(line))
        self.nodes += 1
        if self.nodes > _MOST_NODES or len(self.open) > DEEPEST:
            raise _TooMuchError(line)
        self.open.add(node)
        value: Any = None
        if isinstance(node, yaml.ScalarNode):
            self.characters += len(node.value)
            if self.characters > MOST_CHARACTERS:
                raise _TooMuchError(line)
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
        """Return a scalar as null, bool, int, float or str."""
        if node.tag not in _SCALARS:
            self.report(path, f"the tag {node.tag} is not supported", line)
            return None
        try:
            return _SCALARS[node.tag](node.value)
        except (ValueError, KeyError):
            self.report(path, f"{show_value(node.value)} cannot be read as {node.tag.removeprefix(_TAG)}", line)
            return None

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        """Return a mapping whose keys are text, and report a key that comes twice."""
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
        """Note a problem of the value at `path`, or of the whole text where `path` is empty."""
        self.problems.append(f"{path}: {text} ({self.place(line)})" if path else f"{text} ({self.place(line)})")
