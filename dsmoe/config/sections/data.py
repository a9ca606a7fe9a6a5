"""The section `data`: corpora, tokenizer, cache and order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dsmoe.config.errors import Problem
from dsmoe.config.sections.base import (
    Fraction,
    MathEffect,
    Name,
    NoEffect,
    NonNegativeInt,
    PositiveFloat,
    Section,
    TensorEffect,
    Text,
)

if TYPE_CHECKING:
    from dsmoe.config.sections.model import Model


class Source(Section):
    """One corpus. Its name labels its own validation loss."""

    name: MathEffect[Name]
    """Label of the source in metrics and in the cache."""
    path: MathEffect[Text | None] = None
    """A file, a folder, a glob, or `builtin:shakespeare` / `builtin:python`."""
    hub: MathEffect[Text | None] = None
    """A data set on the Hugging Face hub, instead of `path`."""
    split: MathEffect[Text] = "train"
    """The hub data set's split."""
    format: MathEffect[Literal["text", "jsonl", "parquet"]] = "text"
    """Format of the files at `path`: `text`, a file is one document; `jsonl`, one JSON object a line, or in a file
    named `.json` also one array of objects; `parquet`, a row is a document. Text and jsonl may be compressed (gz, bz2,
    xz, zst, lz4). Of a folder are read: `.txt`; `.jsonl`, `.ndjson` and `.json`; or `.parquet`."""
    text_field: MathEffect[Text] = "text"
    """The field that holds the text (jsonl, parquet, hub); no other field is looked at."""
    bad_records: MathEffect[Literal["refuse", "skip"]] = "refuse"
    """Treatment of a record without usable text (no JSON, no such field, null, not UTF-8; a text file is one record):
    `refuse` stops and names it, `skip` leaves it out and counts it. A damaged file is always refused."""
    weight: MathEffect[PositiveFloat] = 1.0
    """Share of the training sequences, relative to the other sources'; exact, however small."""


class Data(Section):
    """The corpora, the tokenizer, the cache of tokens, and the order of training."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)]  # not strict: YAML has lists, no tuples
    """The corpora, mixed by weight."""
    tokenizer: TensorEffect[Text] = "bytes"
    """`bytes` (256 byte values and an end-of-document token), or a `tokenizers` JSON file."""
    end_of_document: MathEffect[Text | None] = None
    """The token of that file that follows every document, as text (`<|im_end|>`); null takes one of the usual names:
    `<|endoftext|>`, `</s>`, `<|end_of_text|>`, `<eos>`."""
    cache_dir: NoEffect[Text] = ".cache/dsmoe"
    """Folder of the tokenized corpora; runs with the same data share it."""
    validation_fraction: MathEffect[Fraction] = 0.05
    """Part of each source's bytes held out, whole documents at a time."""
    seed: MathEffect[NonNegativeInt] = 0
    """Decides the split and the order of the training sequences."""
    changed_order: NoEffect[Literal["refuse", "accept"]] = "refuse"
    """Treatment of a run that resumes with other sources, weights, text or seed than its checkpoint was made with, and
    so reads some text again and leaves other text out: `refuse` says how much, `accept` goes on."""


_BYTES_VOCABULARY = 257
"""256 byte values and the end-of-document token."""

_LEAST_SHARE = 1e-15
"""Least share of the samples: even the longest run has fewer than 1e15 samples."""


def source_problems(data: Data) -> Iterator[Problem]:
    """Check that each source has one place, a name of its own, and a weight that is not negligible."""
    names: set[str] = set()
    total = sum(source.weight for source in data.sources)
    for index, source in enumerate(data.sources):
        key = f"data.sources.{index}"
        yield from _place_problems(key, source)
        if source.weight / total < _LEAST_SHARE:
            yield (
                f"{key}.weight",
                f"{key}.weight ({source.weight:g}) is {source.weight / total:.1g} of all weights ({total:g}), of which "
                "no run would see a sequence; leave the source out, or give it a larger weight",
            )
        if source.name in names:
            yield f"{key}.name", f'{key}.name ("{source.name}") is taken by an earlier source; give it another name'
        names.add(source.name)


def tokenizer_problems(data: Data, model: Model) -> Iterator[Problem]:
    """Check that keys fit the byte tokenizer, which has its own end of document and number of tokens."""
    if data.tokenizer == "bytes" and data.end_of_document is not None:
        yield (
            "data.end_of_document",
            f"data.end_of_document ({data.end_of_document!r}) is for a tokenizer's file, and data.tokenizer is "
            "bytes, which has an end of its own; remove it",
        )
    if data.tokenizer == "bytes" and model.vocab_size < _BYTES_VOCABULARY:
        yield (
            "model.vocab_size",
            f"model.vocab_size ({model.vocab_size}) must be at least {_BYTES_VOCABULARY} for data.tokenizer: bytes "
            "(256 byte values and the end of a document)",
        )


def _place_problems(key: str, source: Source) -> Iterator[Problem]:
    if source.path is None and source.hub is None:
        yield key, f"{key}.path or {key}.hub must say where the text is; set one of them"
    if source.path is not None and source.hub is not None:
        yield f"{key}.hub", f'{key}.path ("{source.path}") and {key}.hub ("{source.hub}") are both set; remove one'
    elif source.hub is not None and source.format != "text":
        yield (
            f"{key}.format",
            f"{key}.format ({source.format}) is for files, and this source is a hub data set; remove it",
        )
    elif source.path is not None and source.split != "train":
        yield (
            f"{key}.split",
            f'{key}.split ("{source.split}") is for hub data sets, and this source is a path; remove it',
        )
