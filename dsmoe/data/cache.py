"""Corpora as token files: made once, found again by a fingerprint of everything that decides their content."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Data, Source
from dsmoe.data.corpora import corpus_state, documents
from dsmoe.data.packing import copy_documents, pack
from dsmoe.data.split import choose_validation, cut_single_document
from dsmoe.data.tokenizer import Tokenizer, load_tokenizer, require_end_of_document, token_dtype

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

_NO_ROOM = {errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""What only writing meets, and nothing but the cache is written; such an error often names no file."""


@dataclass(frozen=True)
class PreparedSource:
    """The token files of one source. Tokens include the end-of-document tokens; bytes are those of the UTF-8 text."""

    name: str
    weight: float
    folder: Path
    dtype: np.dtype
    train_tokens: int
    train_bytes: int
    validation_tokens: int
    validation_bytes: int

    @property
    def validation_bytes_per_token(self) -> float:
        """Bytes of validation text per validation token; nats per token / ln 2 / this is bits per byte."""
        return self.validation_bytes / self.validation_tokens

    @property
    def train(self) -> np.memmap:
        """The training tokens, read-only, `[train_tokens]` of `dtype`."""
        return np.memmap(self.folder / "train.bin", dtype=self.dtype, mode="r")

    @property
    def validation(self) -> np.memmap:
        """The held-out tokens, read-only, `[validation_tokens]` of `dtype`."""
        return np.memmap(self.folder / "validation.bin", dtype=self.dtype, mode="r")


def prepare(config: Config) -> list[PreparedSource]:
    """Tokenise every source of `config.data` into `cache_dir/NAME-FINGERPRINT/`, unless that folder is there.

    Any number of processes may call this at any time: a folder appears complete or not at all. Let one process per file
    system go first, so that the others only open what it made.

    Returns:
        One entry per source, in the order of the config.

    Raises:
        UserError: a corpus or the tokenizer is missing or unreadable, `cache_dir` cannot be used, or a part is shorter
            than one sequence.
    """
    tokenizer = load_tokenizer(config)
    require_end_of_document(tokenizer, config)
    cache_dir = Path(config.data.cache_dir).expanduser().absolute()
    with _blaming(cache_dir):
        prepared = [_prepare_source(source, tokenizer, config.data, cache_dir) for source in config.data.sources]
    problems = [problem for source in prepared for problem in _too_short(source, config)]
    if problems:
        raise UserError("\n".join(problems))
    return prepared


@contextmanager
def _blaming(cache_dir: Path) -> Iterator[None]:
    """Report the system's refusal to use the cache as what it is to the user: a wrong or full `data.cache_dir`."""
    try:
        yield
    except OSError as error:
        named = isinstance(error.filename, str) and _on_one_path(Path(error.filename), cache_dir)
        if not named and error.errno not in _NO_ROOM:
            raise
        where = f" ({error.filename})" if named else ""
        raise UserError(
            f"data.cache_dir: cannot use {cache_dir}: {error.strerror}{where}; "
            "give data.cache_dir a folder that can be written and has room"
        ) from error


def _on_one_path(first: Path, second: Path) -> bool:
    return first.is_relative_to(second) or second.is_relative_to(first)


def _prepare_source(source: Source, tokenizer: Tokenizer, data: Data, cache_dir: Path) -> PreparedSource:
    recipe = {
        "format_version": FORMAT_VERSION,
        "source": corpus_state(source),
        "tokenizer": tokenizer.identity,
        "seed": data.seed,
        "validation_fraction": data.validation_fraction,
    }
    fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    folder = cache_dir / f"{source.name}-{fingerprint}"
    if not folder.exists():
        _build(folder, source, tokenizer, data, recipe)
    return _load(folder, source)


def _build(folder: Path, source: Source, tokenizer: Tokenizer, data: Data, recipe: dict[str, Any]) -> None:
    """Write everything to a hidden folder beside `folder`, then rename it."""
    start = time.monotonic()
    partial = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    logger.info("preparing %s in %s", source.name, folder)
    try:
        _remove_orphans(folder.parent, source.name)
        counts = _write_tokens(partial, source, tokenizer, data)
        meta = {**counts, "dtype": token_dtype(tokenizer.vocab_size).str, "recipe": recipe}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    train, validation = counts["train"], counts["validation"]
    logger.info(
        "prepared %s in %.1f s: train %s tokens of %s documents, validation %s tokens of %s (%.1f%% of %.1f MB)",
        source.name,
        time.monotonic() - start,
        f"{train['tokens']:,}",
        f"{train['documents']:,}",
        f"{validation['tokens']:,}",
        f"{validation['documents']:,}",
        100 * validation["bytes"] / (train["bytes"] + validation["bytes"]),
        (train["bytes"] + validation["bytes"]) / 1e6,
    )


def _remove_orphans(cache_dir: Path, name: str) -> None:
    """Remove the partial folders of source `name` whose process, of this host, was killed."""
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"\.{re.escape(name)}-[0-9a-f]{{16}}\.{host}\.(\d+)\.[0-9a-f]{{32}}\.partial")
    for path in cache_dir.iterdir():
        found = pattern.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            logger.info("removing %s, which a process that was killed has left", path)
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except OSError as error:
        return error.errno != errno.ESRCH  # it is another user's
    return True


def _write_tokens(partial: Path, source: Source, tokenizer: Tokenizer, data: Data) -> dict[str, dict[str, int]]:
    """Write `train.bin` and `validation.bin`; return the tokens, bytes and documents of each."""
    texts: Iterable[str] = documents(source, cache_dir=partial.parent, scratch_dir=partial)
    first_texts = list(itertools.islice(texts, 2))
    single = len(first_texts) == 1
    if single:
        texts = cut_single_document(first_texts[0], data.validation_fraction)
        logger.info("%s is a single document: its last %g is held out", source.name, data.validation_fraction)
    else:
        texts = itertools.chain(first_texts, texts)

    flat = partial / "tokens.bin"
    packed = pack(source.name, texts, tokenizer, salt=f"{data.seed}/{source.name}", target=flat)
    if single:
        validation_D = np.array([False, True])
    else:
        validation_D = choose_validation(packed.hashes, packed.num_bytes, data.validation_fraction)

    counts = {}
    for split, chosen_D in (("train", ~validation_D), ("validation", validation_D)):
        itemsize = token_dtype(tokenizer.vocab_size).itemsize
        copy_documents(flat, packed.num_tokens, chosen_D, itemsize, partial / f"{split}.bin")
        counts[split] = {
            "tokens": int(packed.num_tokens[chosen_D].sum()),
            "bytes": int(packed.num_bytes[chosen_D].sum()),
            "documents": int(chosen_D.sum()),
        }
    flat.unlink()
    return counts


def _publish(partial: Path, folder: Path) -> None:
    """Make `partial` durable and rename it to `folder`, or leave it if another process was first."""
    for path in (*partial.iterdir(), partial):
        _sync(path)
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.exists():
            raise
        logger.info("another process has prepared %s meanwhile; using its files", folder.name)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(folder: Path, source: Source) -> PreparedSource:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = np.dtype(meta["dtype"])
        for split in ("train", "validation"):
            expected = meta[split]["tokens"] * dtype.itemsize
            found = (folder / f"{split}.bin").stat().st_size
            if found != expected:
                raise ValueError(f"{split}.bin has {found} bytes, not {expected}")
        return PreparedSource(
            name=source.name,
            weight=source.weight,
            folder=folder,
            dtype=dtype,
            train_tokens=meta["train"]["tokens"],
            train_bytes=meta["train"]["bytes"],
            validation_tokens=meta["validation"]["tokens"],
            validation_bytes=meta["validation"]["bytes"],
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.cache_dir: {folder} is damaged ({error}); delete that folder and run again") from error


def _too_short(source: PreparedSource, config: Config) -> list[str]:
    needed = config.train.sequence_length + 1
    problems = []
    for part, tokens, fix in (
        ("training", source.train_tokens, "give it more text, or lower train.sequence_length"),
        (
            "validation",
            source.validation_tokens,
            "give it more text or more than one distinct document, raise data.validation_fraction, "
            "or lower train.sequence_length",
        ),
    ):
        if tokens < needed:
            problems.append(
                f"data.sources[{source.name}]: the {part} part has {tokens} tokens, but train.sequence_length "
                f"({config.train.sequence_length}) + 1 = {needed} are needed; {fix}"
            )
    return problems
