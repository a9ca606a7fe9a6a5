"""What `prepare` would say of the sources, before it: for `dsmoe config check`, `plan` and `launch`.

Neither torch nor the network is needed, and nothing is written.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe.config.errors import Problem, UserError
from dsmoe.config.input_files import may, where_looked
from dsmoe.config.partial_config import UnsoundError
from dsmoe.config.paths import may_be_there, unset_in
from dsmoe.config.schema import Config, Source
from dsmoe.data.cache import VERIFIED_AT_START, open_folder, verify_files
from dsmoe.data.cache_lookup import damage_of_copies, place_of, served_note
from dsmoe.data.corpus_files import corpus_files, is_builtin
from dsmoe.data.precheck import source_problems
from dsmoe.data.source_errors import LostCopyError, LostCorpusError, source_error
from dsmoe.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, require_end_of_document

MOST_FILES = 100
"""Of a source, files that are opened: a folder has thousands."""


@dataclass
class Sources:
    """What a look at the sources shows."""

    notes: list[str] = field(default_factory=list)
    """Which of them the cache serves although their text is gone."""
    problems: list[Problem] = field(default_factory=list)
    """For which `prepare` would be refused."""


def check_sources(config: Config) -> Sources:
    """Look at every source as `prepare` does at first, and at what the cache has of those whose text is gone.

    Hub data sets are passed over, and of a source the first `MOST_FILES` files are opened. `config` may have keys that
    are wrong.
    """
    found = Sources()
    with suppress(UnsoundError):
        runs_dir = Path(config.runs_dir).absolute()
        run = runs_dir / config.name
        found.problems += _unusable("runs_dir", run if os.path.isdir(run) else runs_dir)
    with suppress(UnsoundError):
        cache_dir = Path(config.data.cache_dir).absolute()
        is_whole = True
        tokenizer = _tokenizer(config)
        for index, source in enumerate(config.data.sources):
            key = f"data.sources.{index}"
            try:
                note = _served(source, tokenizer, config, cache_dir)
                found.notes += [note] if note else []
            except _NotPreparedError:
                is_whole = False
                found.problems += [(f"{key}.path", problem) for problem in _problems(source, key, cache_dir)]
            except UserError as error:
                found.problems.append((f"{key}.path", _renamed(error, source, key)))
            except OSError as error:  # of the cache: those of the text are translated
                problem = f"data.cache_dir: cannot use {cache_dir}: {error.strerror} ({error.filename})"
                found.problems.append(("data.cache_dir", problem))
        found.problems += _unusable("data.cache_dir", cache_dir, is_written=not is_whole)
    with suppress(UnsoundError):
        found.problems += _tokenizer_problems(config)
    return found


def notes_on_sources(config: Config) -> list[str]:
    """Which sources the cache serves without their text, and which are not here: a run may be planned anywhere.

    Raises:
        UserError: the text of a source is gone, and what the cache has of it is damaged.
    """
    notes: list[str] = []
    cache_dir = Path(config.data.cache_dir).absolute()
    tokenizer = _tokenizer(config)
    for source in config.data.sources:
        try:
            note = _served(source, tokenizer, config, cache_dir)
            notes += [note] if note else []
        except LostCopyError:
            raise
        except LostCorpusError as error:
            notes.append(str(error))
        except (UserError, OSError):  # what `dsmoe config check` says
            pass
    return notes


class _NotPreparedError(UserError):
    """There is text, and no tokens of it."""


def _served(source: Source, tokenizer: Tokenizer | None, config: Config, cache_dir: Path) -> str | None:
    """A note where the cache stands for lost text; None where it has that of text which is there.

    Raises:
        UserError: it has not; a LostCorpusError where there is no text either.
    """
    if source.hub is not None or source.path is None:  # no place at all is said elsewhere
        return None
    if tokenizer is None:
        raise _NotPreparedError
    place = place_of(source, tokenizer, config.data, cache_dir)
    if not place.folder.exists():
        raise _NotPreparedError
    with damage_of_copies({} if place.lost is None else {place.folder: place.lost}):
        prepared, meta, _ = open_folder(place.folder, source, tokenizer, config.data, place.recipe)
        if place.lost is None:
            return None
        verify_files([(prepared, meta)], VERIFIED_AT_START)
    return served_note(place)


def _unusable(key: str, folder: Path, is_written: bool = True) -> list[Problem]:
    """Why nothing can be made in `folder`, as far as what is there tells; a whole cache is not written to."""
    there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not os.path.isdir(there):
        return [(key, f"{key}: cannot use {folder}: {there} is no folder")]
    if may(there, os.W_OK | os.X_OK) or (there == folder and not is_written):
        return []
    what, where = ("use", "it") if there == folder else ("make", there)
    return [(key, f"{key}: cannot {what} {folder}: nothing may be written in {where}")]


def _tokenizer_problems(config: Config) -> list[Problem]:
    if config.data.tokenizer == ByteTokenizer.identity:  # checked with the other keys
        return []
    path = config.data.tokenizer
    if not may_be_there(path):
        return [
            ("data.tokenizer", f"data.tokenizer: there is no file or folder {path}{unset_in(path)}{where_looked(path)}")
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
        return [_renamed(error, source, key)]
    return [_renamed(problem, source, key) for problem in problems]


def _renamed(problem: UserError | str, source: Source, key: str) -> str:
    """With the key as the file has it, which is said with its line, and where nothing is there, where that was."""
    text = str(problem).replace(f"data.sources[{source.name}]", key, 1)
    if not isinstance(problem, LostCorpusError) or isinstance(problem, LostCopyError) or source.path is None:
        return text
    told = text.removesuffix(problem.in_cache)
    return told.replace(os.path.abspath(source.path), source.path) + where_looked(source.path) + problem.in_cache


def _tokenizer(config: Config) -> Tokenizer | None:
    """None where it cannot be used, which is said elsewhere."""
    try:
        return load_tokenizer(config)
    except (UserError, OSError):
        return None
