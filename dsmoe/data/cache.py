"""Cache of tokenized corpora: one folder per source, named by a fingerprint of everything that decides its content."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe.config.errors import UserError, system_error
from dsmoe.config.schema import Config, Data, Source
from dsmoe.data.cache_lookup import Place, locate_source, origin_of, protect_last_copies, served_note, similar_folders
from dsmoe.data.cache_meta import (
    META,
    PARTS,
    Meta,
    document_file,
    old_formats,
    read_meta,
    token_file,
    write_meta,
)
from dsmoe.data.cache_staging import partial_folder
from dsmoe.data.checksummed_files import (
    DamagedCacheError,
    FileReader,
    TokenFile,
    check_size,
    check_sums,
    spans,
    sums_path,
    verify,
)
from dsmoe.data.corpora import TextDigest, documents
from dsmoe.data.held_out_overlap import DOCUMENT, Documents, Split, left_out, write_documents
from dsmoe.data.packing import Packed, Progress, copy_documents, document_hash, pack
from dsmoe.data.precheck import precheck
from dsmoe.data.prepared_source import PreparedSource, too_short
from dsmoe.data.tokenizer import Tokenizer, token_dtype
from dsmoe.data.validation_split import choose_validation, cut_single_document, hash_limit
from dsmoe.runtime.atomic_files import publish_folder, sync_file, sync_folder

logger = logging.getLogger(__name__)

VERIFIED_AT_START = 8 << 30
"""Bytes of the cache that are verified when training starts."""

_VERIFIED: dict[tuple[Any, ...], bool] = {}
"""True if all bytes were verified, by folder and states of its files; only folders that this process has verified."""
_REPORTED: set[Path] = set()
"""Folders whose use without their text has been logged."""
_NO_ROOM = {errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""Errors that only writing raises, and only the cache is written; the error often names no file."""


def prepare(config: Config, check: int | None = None) -> list[PreparedSource]:
    """Tokenise every source of `config.data` into `cache_dir/NAME-FINGERPRINT/`, unless that folder exists.

    Any number of processes may call this at any time: a folder appears complete or not at all. Let one process per file
    system go first, so that the others only open the finished folders.

    Args:
        config: reads `data`, `model.vocab_size` and `train.sequence_length`.
        check: how many bytes of the files to verify, spread evenly over the files; None for all. Files that this
            process has verified and that have not changed since are not read again. The rest is verified when it is
            read for training.

    Returns:
        One entry per source, in the order of the config.

    Raises:
        UserError: corpora or the tokenizer are missing or unreadable (every problem that `precheck` finds is reported
            before anything is tokenised); `cache_dir` cannot be used or has a damaged file; or a part is shorter than
            one sequence.
    """
    cache_dir = Path(config.data.cache_dir).absolute()
    with _as_cache_dir_problem(cache_dir):
        places: dict[str, Place] = {}

        def is_prepared(source: Source, tokenizer: Tokenizer) -> bool:
            place = places[source.name] = locate_source(source, tokenizer, config.data, cache_dir)
            if place.lost is not None and place.folder not in _REPORTED:
                _REPORTED.add(place.folder)
                logger.warning("%s", served_note(place))
            return place.folder.exists()

        tokenizer = precheck(config, cache_dir, is_prepared)
        with protect_last_copies({place.folder: place.lost for place in places.values() if place.lost is not None}):
            found = [
                _prepare_source(source, tokenizer, config.data, places[source.name]) for source in config.data.sources
            ]
            if check != 0:
                verify_files([(source, meta) for source, meta, _ in found], check)
        prepared = _exclude_held_out([source for source, _, _ in found], [split for _, _, split in found], check != 0)
    problems = [problem for source in prepared for problem in too_short(source, config)]
    if problems:
        raise UserError("\n".join(problems))
    return prepared


def _exclude_held_out(
    sources: Sequence[PreparedSource], splits: Sequence[Split], is_logged: bool
) -> list[PreparedSource]:
    """Return the sources, each with the ranges of its training tokens that the others hold out."""
    log = logger.info if is_logged else logger.debug
    result = []
    for source, ranges in zip(sources, left_out(list(splits)), strict=True):
        result.append(replace(source, left_out=tuple(ranges)))
        if ranges:
            tokens = sum(end - begin for begin, end in ranges)
            log(
                "%s: %s of its %s training tokens are held out in another source, and are not trained on",
                *(source.name, f"{tokens:,}", f"{source.train_tokens:,}"),
            )
    return result


@contextmanager
def _as_cache_dir_problem(cache_dir: Path) -> Iterator[None]:
    """Turn the system's refusal to read or write the cache into an error about `data.cache_dir`."""
    try:
        yield
    except OSError as error:
        named = isinstance(error.filename, str) and _one_contains_other(Path(error.filename), cache_dir)
        if not named and error.errno not in _NO_ROOM:
            raise
        where = f" ({error.filename})" if named else ""
        raise system_error(
            f"data.cache_dir: cannot use {cache_dir}: {error.strerror}{where}; "
            "give data.cache_dir a folder that can be read and written, and has room",
            error,
        ) from error


def _one_contains_other(first: Path, second: Path) -> bool:
    """Return whether one path is the other or an ancestor of it."""
    return first.is_relative_to(second) or second.is_relative_to(first)


def _prepare_source(
    source: Source, tokenizer: Tokenizer, data: Data, place: Place
) -> tuple[PreparedSource, Meta, Split]:
    if not place.folder.exists():
        _build(place, source, tokenizer, data)
    prepared, meta, split = open_folder(place.folder, source, tokenizer, data, place.recipe)
    return replace(prepared, lost_path=place.lost_path), meta, split


def _build(place: Place, source: Source, tokenizer: Tokenizer, data: Data) -> None:
    """Write all files into a hidden folder beside `place.folder`, then rename the hidden folder."""
    start, folder = time.monotonic(), place.folder
    known = _find_same_text(place, source, tokenizer, data)
    if known is not None:
        with partial_folder(folder, source.name) as partial:
            _copy_folder(*known, partial, source, place.recipe)
            _publish(partial, folder)
        return
    logger.info("preparing %s in %s", source.name, folder)
    for path, version in old_formats(folder.parent, source.name):
        logger.info(
            "%s is of format %s, without checksums and with another split: it is not used any more, and can be removed "
            "when no run of an earlier version needs it",
            *(path, version),
        )
    with partial_folder(folder, source.name) as partial:
        meta = _write_tokens(partial, source, tokenizer, data, place.recipe)
        write_meta(partial, meta)
        _publish(partial, folder)
    train, validation = meta.train, meta.validation
    logger.info(
        "prepared %s in %.1f s: train %s tokens of %s documents, validation %s tokens of %s (%.1f%% of %.1f MB)",
        source.name,
        time.monotonic() - start,
        f"{train.tokens:,}",
        f"{train.documents:,}",
        f"{validation.tokens:,}",
        f"{validation.documents:,}",
        100 * validation.bytes / (train.bytes + validation.bytes),
        (train.bytes + validation.bytes) / 1e6,
    )


def _find_same_text(place: Place, source: Source, tokenizer: Tokenizer, data: Data) -> tuple[Path, Meta] | None:
    """Find a folder made of the same text from files that have since been moved, copied or touched.

    Other text may have the same names, sizes and times, so the whole text is read and its digest compared.
    """
    known: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder, recipe, digest in similar_folders(source, place):
        if digest:
            known.setdefault(digest, []).append((folder, recipe))
        else:
            why = "an earlier version of dsmoe made it, without a checksum of its text to compare"
            logger.info("%s: %s may be of the same text, and is not used: %s", source.name, folder, why)
    if not known:
        return None
    folders = " or ".join(str(made[0][0]) for made in known.values())
    logger.info("%s: reading its files, to see whether their text is that of %s", source.name, folders)
    text, progress = TextDigest(), Progress(source.name)
    for document in text.passing(documents(source, place.folder.parent)):
        progress.add(len(document))
        progress.report()
    for folder, recipe in known.get(text.hexdigest(), []):
        try:
            prepared, meta, _ = open_folder(folder, source, tokenizer, data, recipe)
            verify_files([(prepared, meta)], None)
        except (DamagedCacheError, OSError) as error:
            logger.warning("%s is of the text of %s, and is not used: %s", folder, source.name, error)
            continue
        logger.info("%s: its text is that of %s, and its tokens are taken from there", source.name, folder)
        return folder, meta
    logger.info("%s: its text is to be tokenized", source.name)
    return None


def _copy_folder(folder: Path, meta: Meta, partial: Path, source: Source, recipe: dict[str, Any]) -> None:
    """Fill `partial` with the files of a folder of the same text: hard links where possible, else copies."""
    for name in meta.files():
        for file in (folder / name, sums_path(folder / name)):
            try:
                os.link(file, partial / file.name)
            except OSError:  # a file system without links, or another user's file
                shutil.copyfile(file, partial / file.name)
    assert meta.origin is not None
    origin = origin_of(source, folder.parent, meta.origin.blake2b)
    write_meta(partial, meta.model_copy(update={"recipe": recipe, "origin": origin}))


def _write_tokens(partial: Path, source: Source, tokenizer: Tokenizer, data: Data, recipe: dict[str, Any]) -> Meta:
    """Write the files of both parts; return their metadata."""
    digest = TextDigest()
    texts: Iterable[str] = digest.passing(documents(source, cache_dir=partial.parent))
    first_texts = list(itertools.islice(texts, 2))
    is_cut = len(first_texts) == 1
    if is_cut:
        texts = cut_single_document(first_texts[0], data.validation_fraction)
        logger.info("%s is a single document: its last %g is held out", source.name, data.validation_fraction)
    else:
        texts = itertools.chain(first_texts, texts)

    flat = partial / "tokens.bin"
    packed = pack(source.name, texts, tokenizer, seed=data.seed, target=flat)
    if is_cut:
        validation_D = np.array([False, True])
        # The hash of the uncut document: another source may have the same text as one document of many.
        document = document_hash(first_texts[0], data.seed)
        packed = replace(packed, hashes=np.full(2, document, dtype=np.uint64))
    else:
        validation_D = choose_validation(packed.hashes, packed.num_bytes, data.validation_fraction)

    dtype = token_dtype(tokenizer.vocab_size)
    parts = {
        part: _write_part(partial, part, packed, chosen_D, dtype)
        for part, chosen_D in zip(PARTS, (~validation_D, validation_D), strict=True)
    }
    flat.unlink()
    origin = origin_of(source, partial.parent, digest.hexdigest())
    shared = {"dtype": dtype.str, "max_token": packed.max_token, "is_cut": is_cut, "recipe": recipe, "origin": origin}
    return Meta.model_validate({**parts, **shared})


def _write_part(partial: Path, part: str, packed: Packed, chosen_D: np.ndarray, dtype: np.dtype) -> dict[str, Any]:
    """Write the chosen documents of `partial/tokens.bin`; return the fields of `Part`."""
    flat = partial / "tokens.bin"
    tokens = copy_documents(flat, packed.num_tokens, chosen_D, dtype.itemsize, partial / token_file(part))
    listed = write_documents(partial / document_file(part), packed.hashes[chosen_D], packed.num_tokens[chosen_D])
    return {
        "tokens": int(packed.num_tokens[chosen_D].sum()),
        "bytes": int(packed.num_bytes[chosen_D].sum()),
        "documents": int(chosen_D.sum()),
        "token_file": asdict(tokens),
        "document_file": asdict(listed),
    }


def _publish(partial: Path, folder: Path) -> None:
    """Force `partial` onto the disk and rename it to `folder`, or leave it if another process was first."""
    for path in partial.iterdir():
        sync_file(path)
    sync_folder(partial)
    try:
        publish_folder(partial, folder)
    except OSError:
        if not (folder.exists() and partial.exists()):
            raise
        logger.info("another process has prepared %s meanwhile; using its files", folder.name)
        sync_folder(folder.parent)


def open_folder(
    folder: Path, source: Source, tokenizer: Tokenizer, data: Data, recipe: dict[str, Any]
) -> tuple[PreparedSource, Meta, Split]:
    """Open a cache folder after checking its `meta.json` and the sizes of its files; no tokens are read.

    Raises:
        DamagedCacheError: a file is missing or not what was written.
        OSError: a file cannot be read.
    """
    meta, dtype = read_meta(folder, recipe), token_dtype(tokenizer.vocab_size)
    if meta.dtype != dtype.str or meta.max_token >= tokenizer.vocab_size:
        raise DamagedCacheError(
            folder,
            f"{META}: tokens up to {meta.max_token} as {meta.dtype}, and the tokenizer has {tokenizer.vocab_size}",
        )
    for name, stored in meta.files().items():
        check_size(folder / name, stored)
    for part, found in meta.parts().items():
        sizes = (found.token_file.bytes, found.document_file.bytes)
        if sizes != (found.tokens * dtype.itemsize, found.documents * DOCUMENT.itemsize):
            raise DamagedCacheError(folder, f"{META}: the sizes of {part} are not those of its tokens and documents")
    listed = {part: Documents(folder / document_file(part), found.documents) for part, found in meta.parts().items()}
    prepared = PreparedSource(
        name=source.name,
        weight=source.weight,
        folder=folder,
        dtype=dtype,
        train_tokens=meta.train.tokens,
        train_bytes=meta.train.bytes,
        validation_tokens=meta.validation.tokens,
        validation_bytes=meta.validation.bytes,
        max_token=meta.max_token,
        tokenizer=tokenizer.identity.partition(" ")[0],
        token_checksums=f"{meta.train.token_file.xxh128}/{meta.validation.token_file.xxh128}",
    )
    limit = hash_limit(data.validation_fraction)
    return prepared, meta, Split(listed["train"], listed["validation"], meta.is_cut, limit)


def verify_files(sources: Sequence[tuple[PreparedSource, Meta]], budget: int | None) -> None:
    """Verify up to `budget` bytes of the sources' files, evenly spread, and all of their checksums.

    Args:
        sources: each with the metadata of its folder.
        budget: in bytes; None for all.

    Raises:
        DamagedCacheError: a file is not what was written.
    """
    pieces: list[tuple[FileReader | TokenFile, int, int]] = []
    states, total = [], 0
    for source, meta in sources:
        files = meta.files()
        state = (source.folder, *(_state(source.folder / name) for name in files))
        if _VERIFIED.get(state, False) or (state in _VERIFIED and budget is not None):
            continue
        states.append(state)
        total += sum(stored.bytes for stored in files.values())
        for name, stored in files.items():
            check_sums(source.folder / name, stored)
        for part, file in (("train", source.train_file), ("validation", source.validation_file)):
            pieces += [(file, *span) for span in spans(meta.parts()[part].token_file.bytes, source.dtype.itemsize)]
            listed = meta.parts()[part].document_file.bytes
            reader = FileReader(source.folder / document_file(part), listed)
            pieces += [(reader, *span) for span in spans(listed)]
    every = 1 if budget is None else max(1, -(-total // budget))
    if every > 1:
        logger.info(
            "checking 1 / %d of the cache now, and the rest as it is read (all of it at once: dsmoe prepare)", every
        )
    verify(pieces[::every])
    _VERIFIED.update(dict.fromkeys(states, every == 1))


def _state(path: Path) -> tuple[int, ...]:
    """Return numbers of which one changes whenever the file or its checksums are rewritten."""
    status = [file.stat() for file in (path, sums_path(path))]
    return tuple(number for s in status for number in (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
