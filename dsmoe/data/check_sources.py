"""Checks of the sources for `dsmoe config check`, `plan` and `launch`: the problems that `prepare` would report.

Needs neither torch nor the network, and writes nothing.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe.config.errors import Problem, UserError
from dsmoe.config.input_files import may_access, where_searched
from dsmoe.config.partial_config import InvalidKeyError
from dsmoe.config.paths import may_exist, unset_variables_note
from dsmoe.config.schema import Config, Source
from dsmoe.data.cache import VERIFIED_AT_START, open_folder, verify_files
from dsmoe.data.cache_lookup import locate_source, protect_last_copies, served_note
from dsmoe.data.corpus_files import corpus_files, is_builtin
from dsmoe.data.precheck import source_problems
from dsmoe.data.source_errors import LostCopyError, LostCorpusError, source_error
from dsmoe.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, require_end_of_document

MOST_FILES = 100
"""Files of one source that are opened: a folder may have thousands."""


@dataclass
class SourceCheck:
    """The findings of `check_sources`."""

    notes: list[str] = field(default_factory=list)
    """A line for each source that the cache serves although its text is gone."""
    problems: list[Problem] = field(default_factory=list)
    """The problems for which `prepare` would be refused."""


def check_sources(config: Config) -> SourceCheck:
    """Check every source as `prepare` does before it tokenises, and the cached tokens of sources whose text is gone.

    Hub data sets are not checked, and only the first `MOST_FILES` files of a source are opened. `config` may be a
    `valid_part`.
    """
    found = SourceCheck()
    with suppress(InvalidKeyError):
        runs_dir = Path(config.runs_dir).absolute()
        run = runs_dir / config.name
        found.problems += _folder_problems("runs_dir", run if os.path.isdir(run) else runs_dir)
    with suppress(InvalidKeyError):
        cache_dir = Path(config.data.cache_dir).absolute()
        is_whole = True
        tokenizer = _tokenizer(config)
        for index, source in enumerate(config.data.sources):
            key = f"data.sources.{index}"
            try:
                note = _note_on_source(source, tokenizer, config, cache_dir)
                found.notes += [note] if note else []
            except _NotPreparedError:
                is_whole = False
                found.problems += [(f"{key}.path", problem) for problem in _problems(source, key, cache_dir)]
            except UserError as error:
                found.problems.append((f"{key}.path", _with_config_key(error, source, key)))
            except OSError as error:  # raised by the cache: errors of the text are translated
                problem = f"data.cache_dir: cannot use {cache_dir}: {error.strerror} ({error.filename})"
                found.problems.append(("data.cache_dir", problem))
        found.problems += _folder_problems("data.cache_dir", cache_dir, is_written=not is_whole)
    with suppress(InvalidKeyError):
        found.problems += _tokenizer_problems(config)
    return found


def notes_on_sources(config: Config) -> list[str]:
    """Return a line for each source that has no text on this machine: served by the cache, or missing.

    Missing text is no error, because a run may be planned on any machine.

    Raises:
        UserError: the text of a source is gone, and its tokens in the cache are damaged.
    """
    notes: list[str] = []
    cache_dir = Path(config.data.cache_dir).absolute()
    tokenizer = _tokenizer(config)
    for source in config.data.sources:
        try:
            note = _note_on_source(source, tokenizer, config, cache_dir)
            notes += [note] if note else []
        except LostCopyError:
            raise
        except LostCorpusError as error:
            notes.append(str(error))
        except (UserError, OSError):  # `dsmoe config check` reports them
            pass
    return notes


class _NotPreparedError(UserError):
    """A source has text, but no tokens in the cache."""


def _note_on_source(source: Source, tokenizer: Tokenizer | None, config: Config, cache_dir: Path) -> str | None:
    """Return a note if the cache serves a source whose text is gone; None if its text exists and is cached.

    Raises:
        UserError: the source is not in the cache (`_NotPreparedError`), or has no text either (LostCorpusError).
    """
    if source.hub is not None or source.path is None:  # a source with neither path nor hub is reported elsewhere
        return None
    if tokenizer is None:
        raise _NotPreparedError
    place = locate_source(source, tokenizer, config.data, cache_dir)
    if not place.folder.exists():
        raise _NotPreparedError
    with protect_last_copies({} if place.lost is None else {place.folder: place.lost}):
        prepared, meta, _ = open_folder(place.folder, source, tokenizer, config.data, place.recipe)
        if place.lost is None:
            return None
        verify_files([(prepared, meta)], VERIFIED_AT_START)
    return served_note(place)


def _folder_problems(key: str, folder: Path, is_written: bool = True) -> list[Problem]:
    """Return why `folder` cannot be made or written, as far as its nearest existing ancestor tells.

    `is_written` is false for a complete cache, which may be read-only.
    """
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not os.path.isdir(existing):
        return [(key, f"{key}: cannot use {folder}: {existing} is no folder")]
    if may_access(existing, os.W_OK | os.X_OK) or (existing == folder and not is_written):
        return []
    what, where = ("use", "it") if existing == folder else ("make", existing)
    return [(key, f"{key}: cannot {what} {folder}: nothing may be written in {where}")]


def _tokenizer_problems(config: Config) -> list[Problem]:
    if config.data.tokenizer == ByteTokenizer.identity:  # a cross-field check has its rules
        return []
    path = config.data.tokenizer
    if not may_exist(path):
        return [
            (
                "data.tokenizer",
                f"data.tokenizer: there is no file or folder {path}{unset_variables_note(path)}{where_searched(path)}",
            )
        ]
    try:
        tokenizer = load_tokenizer(config)
    except UserError as error:
        return [(re.split("[ :]", str(error), maxsplit=1)[0], str(error))]
    try:
        require_end_of_document(tokenizer, config)
    except UserError as error:
        return [("data.end_of_document", str(error))]
    return []


def _problems(source: Source, key: str, cache_dir: Path) -> list[str]:
    try:
        problems = source_problems(source, cache_dir, MOST_FILES)
        if not problems and not is_builtin(source) and not any(file.stat().st_size for file in corpus_files(source)):
            raise source_error(source, "path", f"{source.path} has no text in it: all of its files are empty")
    except UserError as error:
        return [_with_config_key(error, source, key)]
    return [_with_config_key(problem, source, key) for problem in problems]


def _with_config_key(problem: UserError | str, source: Source, key: str) -> str:
    """Return a problem's message with the source's key as in the YAML file; for lost text, with the path as written.

    The loader adds the file and the line of that key.
    """
    text = str(problem).replace(f"data.sources[{source.name}]", key, 1)
    if not isinstance(problem, LostCorpusError) or isinstance(problem, LostCopyError) or source.path is None:
        return text
    lost = text.removesuffix(problem.in_cache)
    return lost.replace(os.path.abspath(source.path), source.path) + where_searched(source.path) + problem.in_cache


def _tokenizer(config: Config) -> Tokenizer | None:
    """Load the tokenizer; None if it cannot be used, which `_tokenizer_problems` reports."""
    try:
        return load_tokenizer(config)
    except (UserError, OSError):
        return None
