"""Documents of a source as a stream of text, always in the same order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe.config.schema import Source
from dsmoe.data.corpus_files import corpus_files, find_files, is_builtin
from dsmoe.data.hub import hub_records
from dsmoe.data.readers import records
from dsmoe.data.source_errors import BadFileError, BadRecord, shown, source_error, translated

logger = logging.getLogger(__name__)


def documents(source: Source, cache_dir: Path) -> Iterator[str]:
    """Yield every document of `source` that has text, in corpus order.

    Line ends of text files become line feeds. Documents that are empty or only white space are left out; so are records
    without usable text if `bad_records` is `skip`, and the log says how many. Memory holds one text file, one record of
    jsonl or one parquet row group at a time. `datasets` keeps its downloads below `cache_dir`.

    Raises:
        UserError: the corpus is missing, unreadable, damaged, of another format, or has no text; the message names the
            file.
        OSError: the storage failed; with the file's name.
    """
    num_documents = num_skipped = 0
    first_skipped = ""
    for record in _all_records(source, cache_dir):
        if isinstance(record, BadRecord):
            if source.bad_records == "refuse":
                raise record.error(source)
            num_skipped += 1
            first_skipped = first_skipped or shown(record.message)
        elif record and not record.isspace():
            num_documents += 1
            yield record
    skipped = f"{num_skipped:,} bad records were skipped, the first: {first_skipped}"
    if num_skipped:
        logger.warning("data.sources[%s].bad_records: %s", source.name, skipped)
    if not num_documents:
        why = f"; {skipped}" if num_skipped else ""
        raise source_error(
            source, "hub" if source.hub else "path", f"{source.hub or shown(source.path or '')} has no text in it{why}"
        )


def corpus_state(source: Source) -> dict[str, Any]:
    """Return everything that decides the text of `source`, as JSON: equal states mean the same documents.

    A user's files are identified by path, size and modification time; builtins by name, size and version; a hub data
    set by name and split only, so a change on the hub is not noticed.

    Raises:
        UserError: as `corpus_files`.
    """
    state = source_state(source)
    if source.hub is not None:
        return state
    if source.path == "builtin:python":
        state["python"] = platform.python_version()
    digest = hashlib.sha256()
    files = corpus_files(source)
    for file in files:
        with translated(source, file):
            status = file.stat()
        identity = (
            [file.name, status.st_size] if is_builtin(source) else [str(file), status.st_size, status.st_mtime_ns]
        )
        digest.update(json.dumps(identity).encode("utf-8"))
    return {**state, "num_files": len(files), "files": f"sha256:{digest.hexdigest()}"}


def names_and_sizes(source: Source) -> str:
    """Return a digest of the names and sizes of a user's files, with names relative to their common folder.

    Copies of the files in another folder have the same digest. Different files may have it too: an equal digest only
    shows that the texts are worth comparing.

    Raises:
        UserError: as `corpus_files`.
    """
    files = corpus_files(source)
    root = os.path.commonpath([file.parent for file in files])
    listed = []
    for file in files:
        with translated(source, file):
            listed.append([os.path.relpath(file, root), file.stat().st_size])
    return hashlib.sha256(json.dumps(listed).encode("utf-8")).hexdigest()


class TextDigest:
    """Running checksum of documents, exact and in order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def passing(self, texts: Iterator[str]) -> Iterator[str]:
        """Yield the documents unchanged while adding each to the checksum."""
        for text in texts:
            data = text.encode("utf-8")
            self._hash.update(len(data).to_bytes(8, "little"))
            self._hash.update(data)
            yield text

    def hexdigest(self) -> str:
        """Return the checksum of all documents so far, 32 hexadecimal digits."""
        return self._hash.hexdigest()


def source_state(source: Source) -> dict[str, Any]:
    """Return the part of `corpus_state` that comes from the config."""
    # A key that caches of earlier versions do not have is left out at its default, so that they stay valid.
    new = {"bad_records"} if source.bad_records == "refuse" else set()
    state = source.model_dump(exclude={"weight", *new})
    if source.path is not None and not is_builtin(source):
        state["path"] = str(Path(source.path).absolute())  # the same for every spelling and working directory
    return state


def _all_records(source: Source, cache_dir: Path) -> Iterator[str | BadRecord]:
    if source.hub is not None:
        yield from hub_records(source, cache_dir)
        return
    found = find_files(source)
    logger.info("data.sources[%s].path: %s", source.name, found.summary())
    for file in found.files:
        with translated(source, file):
            if is_builtin(source):
                yield _read_lenient(file)
                continue
            before = file.stat()
            yield from records(source, file)
            after = file.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise BadFileError("path", f"{shown(file)} changed while it was read; run again when it is complete")


def _read_lenient(file: Path) -> str:
    """Read a builtin file as UTF-8, else as Latin-1, the two encodings of such files."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return file.read_text(encoding="latin-1")
