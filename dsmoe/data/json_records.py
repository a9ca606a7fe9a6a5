"""Records of JSON files: one object per line, or one array of objects."""

from __future__ import annotations

import codecs
import functools
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from dsmoe.data.source_errors import BadFileError, BadRecord

RECORD_LIMIT = 1 << 30
"""Bytes of the longest record, because a file without line ends would else have to fit into memory."""

_CHUNK = 1 << 20
_BOM = "\ufeff"
_DEEPEST = 100
"""Levels of nesting that are parsed at once; `json` recurses once per level."""
_TYPE_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}

_BYTE_ORDER_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_UNMARKED_ENCODINGS = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")

# A string, a bracket or a comma. Group 1 is the closing quote of a string; it is empty if the text ends in the string.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{},]', re.DOTALL)


def json_records(name: str, stream: io.BufferedReader, field: str, may_be_array: bool) -> Iterator[str | BadRecord]:
    """Yield the string `field` of every record, or a BadRecord for a record without usable text.

    Args:
        name: name of the file in messages.
        stream: the bytes of the file, UTF-8, with or without byte order marks before records; can `peek`.
        field: the field that holds the text.
        may_be_array: whether a file that begins with `[` is one array of objects, instead of an object per line.

    Raises:
        BadFileError: a record is longer than `RECORD_LIMIT`, or an array is not UTF-8 or has no end.
    """
    if may_be_array and stream.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        for item, text in enumerate(_array_items(name, stream), start=1):
            yield _text_of(text, field, f"{name}, item {item}")
        return
    number = offset = 0
    for raw in iter(functools.partial(stream.readline, RECORD_LIMIT + 1), b""):
        if len(raw) > RECORD_LIMIT:
            raise BadFileError("format", f"{name}:{number + 1}: a line of more than {RECORD_LIMIT >> 30} GiB")
        for line in _lines(raw):
            number += 1
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield not_utf8(name, line, offset + error.start, number)
            else:
                if text and not text.isspace():
                    yield null_character(name, line, offset, number) or _text_of(text, field, f"{name}:{number}")
            offset += len(line)


def not_utf8(name: str, data: bytes, position: int, line: int) -> BadRecord:
    """Return the BadRecord of bytes that are not UTF-8, with advice on how to convert the file.

    Args:
        name: name of the file in messages.
        data: bytes of the record.
        position: position of the wrong byte in the decompressed file, counted from 0.
        line: line of the wrong byte, counted from 1.
    """
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    advice = f"it begins like {encoding}: iconv -f {encoding} -t UTF-8" if encoding else "e.g. with iconv -t UTF-8"
    return BadRecord("path", f"{name} is not UTF-8 at byte {position}, line {line}", f"convert it, {advice}")


def null_character(name: str, data: bytes, offset: int = 0, line: int = 1) -> BadRecord | None:
    """Return the BadRecord of a text with a null character, with its place and likely cause; None without one.

    Args:
        name: name of the file in messages.
        data: the file, or a part of it.
        offset: position of the part in the file, in bytes.
        line: line of the file where the part begins, counted from 1.
    """
    position = data.find(b"\0")
    if position < 0:
        return None
    line += data.count(b"\n", 0, position)
    problem = f"{name} is no text: byte {offset + position}, line {line}, is a null character"
    if not data.strip(b"\0"):
        return BadRecord(
            "path", problem, "null characters stand in the place of its text, as after a crash: get it again"
        )
    texts = {}
    for encoding in _UNMARKED_ENCODINGS:
        with suppress(UnicodeDecodeError):
            texts[encoding] = data[: len(data) // 4 * 4].decode(encoding)
    likely = [encoding for encoding, text in texts.items() if "\0" not in text]
    if likely:  # read with the bytes swapped, a space is U+2000: the encoding with more spaces is the right one
        encoding = max(likely, key=lambda encoding: sum(map(texts[encoding].count, " \n")))
        return BadRecord("path", problem, f"if that is {encoding}, convert it: iconv -f {encoding} -t UTF-8")
    return BadRecord("path", problem, "get it again, or take it out of the corpus")


def _lines(raw: bytes) -> list[bytes]:
    """Split `raw`, which ends at a line feed, at carriage returns as well, because old files have no line feeds."""
    if b"\r" not in raw or raw.find(b"\r") == len(raw) - 2:
        return [raw]
    return re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", raw)


def _text_of(line: str, field: str, where: str) -> str | BadRecord:
    """Return the text of one record given as JSON."""
    line = line.lstrip(_BOM)  # concatenated files have marks in the middle
    try:
        record = _parse(line)
    except json.JSONDecodeError as error:
        column = f" at column {error.colno}" if error.doc is line else ""
        return BadRecord("format", f"{where}: not JSON ({error.msg}{column})", _expected(line))
    if not isinstance(record, dict):
        return BadRecord(
            "format", f"{where}: a JSON {type(record).__name__}, where an object was expected", _expected(line)
        )
    return field_text(record, field, where)


def _expected(line: str) -> str:
    spread_out = line.startswith("[") or line.strip() == "{"
    return "give every object a line of its own, or put them in one array in a .json file" if spread_out else "mend it"


def field_text(record: dict[str, Any], field: str, where: str) -> str | BadRecord:
    """Return the string `field` of one record of JSON or of the hub; `where` names its file and line."""
    if field not in record:
        return BadRecord("text_field", f"{where}: {missing_field(field, list(record))}", advice="")
    text = record[field]
    if not isinstance(text, str):
        kind = _TYPE_NAMES.get(type(text), type(text).__name__)
        return BadRecord("text_field", f"{where}: field {field!r} is {kind}, not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            return BadRecord("text_field", f"{where}: not valid Unicode ({error.reason})")
    return text


def missing_field(field: str, fields: list[str]) -> str:
    """Return the message for a missing field, with the first 60 characters of the first 30 fields."""
    names = ", ".join(name[:60] for name in fields[:30]) + (f" and {len(fields) - 30} more" if len(fields) > 30 else "")
    return f"no field {field!r}; the fields are {names or 'none'}"


def _parse(text: str) -> Any:
    """Parse JSON like `json.loads`, but with numbers of any length and values nested to any depth."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):  # Python limits an int to 4,300 digits
        return json.loads(_flattened(text), parse_int=float)


def _flattened(text: str) -> str:
    """Replace values nested deeper than `_DEEPEST` by 0, after checking that they are JSON.

    With a limit of 2, `{"a": [[[1], 2]], "b": 3}` is parsed in two pieces, the innermost first:

        [[1], 2]                                          is checked and becomes 0
        {"a": [0], "b": 3}                                is returned
    """
    pieces: list[list[str]] = [[]]  # the text so far of each value that is open at a multiple of the limit
    depth = position = 0
    for token in _TOKEN.finditer(text):
        char = token[0]
        if char in ("[", "{"):
            depth += 1
            if depth > 1 and depth % _DEEPEST == 1:
                pieces[-1].append(text[position : token.start()])
                pieces.append([])
                position = token.start()
        elif char in ("]", "}"):
            if depth > 1 and depth % _DEEPEST == 1:
                inner = "".join([*pieces.pop(), text[position : token.end()]])
                json.loads(inner, parse_int=float)
                pieces[-1].append("0")
                position = token.end()
            depth = max(0, depth - 1)  # a surplus bracket stays in the text, which then is no JSON
    if len(pieces) > 1:
        raise json.JSONDecodeError("Brackets are not closed", "", 0)
    pieces[-1].append(text[position:])
    return "".join(pieces[-1])


def _array_items(name: str, stream: io.BufferedReader) -> Iterator[str]:
    """Yield the text of each item of the array in `stream`; memory holds one item and one chunk."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = ""
    start = position = depth = items = read = 0
    size = _CHUNK
    while depth or not read:
        data = stream.read(size)
        try:
            more = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            pending = len(decoder.getstate()[0])
            raise BadFileError(
                "path", f"{name} is not UTF-8 at byte {read - pending + error.start}; convert it"
            ) from error
        if not data:
            raise BadFileError("format", f"{name} is cut off: the array has no end, in item {items + 1}")
        read += len(data)
        text = text[start:] + more
        position -= start
        start = 0
        for token in _TOKEN.finditer(text, position):
            char = token[0]
            if char[0] == '"':
                if not token[1]:
                    break
            elif char in "[{":
                depth += 1
                if depth == 1:
                    start = token.end()
            elif char != ",":
                if depth == 1 and char == "}":  # inside an item, parsing the item finds a wrong bracket
                    raise BadFileError("format", f"{name}: the array ends with }}, after item {items}, not with ]")
                depth -= 1
            if (char == "," and depth == 1) or depth == 0:
                item = text[start : token.start()]
                if items or depth or item.strip():
                    items += 1
                    yield item
                start = token.end()
            position = token.end()
            if depth == 0:
                break
        # An item longer than a chunk is scanned again with each chunk: growing chunks make that a few times.
        size = max(_CHUNK, len(text) - start)
        if size > RECORD_LIMIT:
            raise BadFileError("format", f"{name}, item {items + 1}: an item of more than {RECORD_LIMIT >> 30} GiB")
    rest = text[position:].encode("utf-8")
    while not rest.strip() and (
        rest := stream.read(_CHUNK)
    ):  # read to the end of the stream, where a compressed file has its checksum
        pass
    if rest.strip():
        raise BadFileError("format", f"{name}: there is more after the end of the array")
