"""Readers of the documents in one file: text, jsonl or parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe.config.schema import Source
from dsmoe.data.decompression import SUFFIXES, contents
from dsmoe.data.json_records import json_records, missing_field, not_utf8, null_character
from dsmoe.data.source_errors import BadFileError, BadRecord, shown

_ROWS = 1000
"""Rows of a parquet file that are turned into Python strings at a time."""


def records(source: Source, file: Path) -> Iterator[str | BadRecord]:
    """Yield the text of every record of `file`, empty texts too, or a BadRecord for a record without usable text.

    Memory holds one text file, or one record of jsonl, or one row group of the parquet column.

    Raises:
        The errors that `source_errors.translated` takes.
    """
    return {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[source.format](file, source.text_field)


def first_record(source: Source, file: Path) -> str | BadRecord | None:
    """Return the first record of `file` after reading as little as possible; None without records.

    Of a text file, only the beginning is read, and the result is a BadRecord or None.

    Raises:
        The errors that `source_errors.translated` takes.
    """
    if source.format != "text":
        return next(records(source, file), None)
    for name, stream in contents(file):
        return null_character(name, stream.peek(1))
    return None


def data_suffix(file: Path) -> str:
    """Return the suffix that shows the format, in small letters, without the suffix of a compression."""
    compressed = file.suffix.lower() in SUFFIXES
    return Path(file.stem if compressed else file.name).suffix.lower()


def _text(file: Path, field: str) -> Iterator[str | BadRecord]:
    for name, stream in contents(file):
        data = stream.read()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            yield not_utf8(name, data, error.start, data.count(b"\n", 0, error.start) + 1)
            continue
        yield null_character(name, data) or text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _jsonl(file: Path, field: str) -> Iterator[str | BadRecord]:
    may_be_array = data_suffix(file) == ".json"
    for name, stream in contents(file):
        yield from json_records(name, stream, field, may_be_array or name.lower().endswith(".json"))


def _parquet(file: Path, field: str) -> Iterator[str | BadRecord]:
    import pyarrow.parquet

    name = shown(file)
    with (
        file.open("rb") as raw,
        pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20, page_checksum_verification=True) as parquet,
    ):
        expected = parquet.metadata.num_rows
        groups = sum(parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))
        if expected != groups:
            raise BadFileError("format", f"{name} is damaged: {expected} rows, but {groups} in its row groups")
        if not expected:  # a job without rows writes such a part, often with other types
            return
        _check_column(parquet.schema_arrow, field, name)
        row = 0
        for batch in parquet.iter_batches(_ROWS, columns=[field]):
            for text in _strings(batch.column(batch.schema.get_field_index(field))):
                if isinstance(text, str):
                    yield text
                else:
                    problem = f"field {field!r} is null, not a string" if text is None else "not UTF-8"
                    yield BadRecord("text_field", f"{name}, row {row}: {problem}")
                row += 1
        if row != expected:
            raise BadFileError("format", f"{name} is damaged: it has {row} rows of {field!r}, not {expected}")


def _check_column(schema: Any, field: str, name: str) -> None:
    """Check that a file has exactly one column of that name, of strings or of nulls only."""
    import pyarrow

    columns = schema.get_all_field_indices(field)
    if not columns:
        raise BadFileError("text_field", f"{name}: {missing_field(field, schema.names)}")
    if len(columns) > 1:
        raise BadFileError("text_field", f"{name}: {len(columns)} fields are called {field!r}")
    kind = schema.field(columns[0]).type
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    string_types = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(fits(kind) for fits in (*string_types, pyarrow.types.is_null)):
        raise BadFileError("text_field", f"{name}: field {field!r} is {kind}, not a string")


def _strings(array: Any) -> list[str | bytes | None]:
    """Turn an Arrow array of strings into Python's; a value that is not UTF-8, which no reader checks, stays bytes."""
    import pyarrow

    array = getattr(array, "storage", array)  # the storage of an extension type
    if pyarrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in array.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value
