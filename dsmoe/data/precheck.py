"""Checks before tokenising: load the tokenizer and read the beginning of every file, to report all problems at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Source
from dsmoe.data.corpus_files import corpus_files, is_builtin
from dsmoe.data.hub import hub_records
from dsmoe.data.readers import first_record
from dsmoe.data.source_errors import BadRecord, source_error, translated
from dsmoe.data.tokenizer import Tokenizer, load_tokenizer, require_end_of_document

_MOST_PROBLEMS = 5
"""Files of one source that are reported one by one: a folder may have thousands."""


def precheck(config: Config, cache_dir: Path, is_prepared: Callable[[Source, Tokenizer], bool]) -> Tokenizer:
    """Load the tokenizer, and open every file of every source that is not in the cache.

    Args:
        config: reads `data` and `model.vocab_size`.
        cache_dir: absolute path; `datasets` keeps its downloads below it.
        is_prepared: returns whether the tokens of a source are in the cache, so that its text is not needed.

    Returns:
        The tokenizer.

    Raises:
        UserError: a line for each problem: the tokenizer does not load, exceeds `model.vocab_size` or has no
            end-of-document token; a file is missing, may not be read, is of another format, or has no usable text in
            its first record.
    """
    problems = []
    tokenizer = None
    try:
        tokenizer = load_tokenizer(config)
        require_end_of_document(tokenizer, config)
    except UserError as error:
        problems.append(str(error))
    for source in config.data.sources:
        try:
            if tokenizer is None or not is_prepared(source, tokenizer):
                problems += source_problems(source, cache_dir)
        except UserError as error:
            problems.append(str(error))
    if tokenizer is None or problems:
        raise UserError("\n".join(problems))
    return tokenizer


def source_problems(source: Source, cache_dir: Path, most_files: int | None = None) -> list[str]:
    """Return the problems that prevent reading `source`, as far as the beginning of every file shows.

    Args:
        source: one source of the config.
        cache_dir: absolute path; `datasets` keeps its downloads below it.
        most_files: number of files that are opened, the first ones; None for all.

    Returns:
        One message per file, at most `_MOST_PROBLEMS` and one that counts the others.

    Raises:
        UserError: the files cannot be found, or the hub data set cannot be opened.
    """
    if source.hub is not None:
        _refuse_if_bad(source, next(hub_records(source, cache_dir), None))
        return []
    files = corpus_files(source)
    problems = []
    for file in [] if is_builtin(source) else files[:most_files]:
        try:
            with translated(source, file):
                record = first_record(source, file)
            _refuse_if_bad(source, record)
        except UserError as error:
            problems.append(str(error))
    if len(problems) > _MOST_PROBLEMS:
        more = f"{len(problems) - _MOST_PROBLEMS:,} more files cannot be read either"
        problems[_MOST_PROBLEMS:] = [str(source_error(source, "path", more))]
    return problems


def _refuse_if_bad(source: Source, record: str | BadRecord | None) -> None:
    if isinstance(record, BadRecord) and source.bad_records == "refuse":
        raise record.error(source)
