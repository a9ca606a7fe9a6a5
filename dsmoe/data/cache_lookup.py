"""Lookup of a source's folder in the cache: by the content of its text, even if the text has been moved or lost."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe.config.dump import flatten
from dsmoe.config.paths import candidate_paths
from dsmoe.config.schema import Data, Source
from dsmoe.data.cache_meta import FORMAT_VERSION, PARTS, Origin, made_folders
from dsmoe.data.checksummed_files import DamagedCacheError
from dsmoe.data.corpora import corpus_state, names_and_sizes, source_state
from dsmoe.data.corpus_files import is_builtin
from dsmoe.data.source_errors import LostCopyError, LostCorpusError, shown
from dsmoe.data.tokenizer import Tokenizer

_FILE_KEYS = ("path", "num_files", "files")
"""Keys of a recipe's source that identify its files and their place."""
_MOST_NAMED = 3
"""The most folders of the cache that a message names."""


@dataclass(frozen=True)
class Place:
    """The folder of the cache for the tokens of a source, whether it exists yet or not."""

    folder: Path
    recipe: dict[str, Any]
    """Everything that decides the content of the folder."""
    lost: LostCorpusError | None = None
    """The error for lost text; None if the text exists. A place with this error has a folder."""
    lost_path: str = ""
    """Absolute path of lost text: the former path, or in a project that was moved, the path that follows from it."""
    moved_note: str = ""
    """End of a message: the path of the text before the project was moved."""


def locate_source(source: Source, tokenizer: Tokenizer, data: Data, cache_dir: Path) -> Place:
    """Return the folder of `source`, named by a hash of everything that decides its content.

    Raises:
        UserError: as `corpus_state`; for example, the text is lost and the cache has no folder made of it.
    """
    recipe: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "source": source_state(source),
        "tokenizer": tokenizer.identity,
        "seed": data.seed,
        "validation_fraction": data.validation_fraction,
    }
    try:
        recipe["source"] = corpus_state(source)
    except LostCorpusError as error:
        return _locate_lost_source(source, recipe, cache_dir, error)
    fingerprint = hashlib.sha256(_text(recipe).encode("utf-8")).hexdigest()[:16]
    return Place(cache_dir / f"{source.name}-{fingerprint}", recipe)


def similar_folders(source: Source, place: Place) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Yield the folders that may have the tokens of a source whose files were moved, copied or touched.

    The settings are equal, and so are the names and sizes of the files, or where these were not recorded, the number of
    files. Yields (folder, recipe, digest of the text); the digest is empty if it was not recorded.
    """
    if not is_user_files(source):
        return
    files = names_and_sizes(source)
    for folder, content in made_folders(place.folder.parent, source.name):
        recipe, origin = content["recipe"], content.get("origin")
        recorded = origin.get("files") if isinstance(origin, dict) else files
        same_number = _source_part(recipe).get("num_files") == place.recipe["source"]["num_files"]
        if recorded == files and same_number and _settings(recipe) == _settings(place.recipe):
            yield folder, recipe, str(origin.get("blake2b", "")) if isinstance(origin, dict) else ""


def is_user_files(source: Source) -> bool:
    """Return whether a source consists of a user's files, neither builtin nor of the hub."""
    return source.path is not None and not is_builtin(source)


def origin_of(source: Source, cache_dir: Path, digest: str) -> Origin | None:
    """Return the record of a user's files for `meta.json`; `digest` is their `TextDigest`. None for other sources."""
    if not is_user_files(source):
        return None
    path = str(Path(source.path or "").absolute())
    from_cache = os.path.relpath(path, cache_dir)
    return Origin(path=_unicode(path), from_cache=_unicode(from_cache), files=names_and_sizes(source), blake2b=digest)


def served_note(place: Place) -> str:
    """Return the note that a folder of the cache replaces lost text."""
    return f"{place.lost}: its tokens are taken from {place.folder}, which was made of what was there{place.moved_note}"


@contextmanager
def protect_last_copies(lost: Mapping[Path, LostCorpusError]) -> Iterator[None]:
    """Replace the advice to delete a damaged folder if the folder is the only copy of lost text.

    Args:
        lost: the errors of lost texts, by the folders that replace them.

    Raises:
        LostCopyError: instead of the DamagedCacheError of one of these folders.
    """
    try:
        yield
    except DamagedCacheError as damage:
        if damage.folder not in lost:
            raise
        raise LostCopyError(
            f"{lost[damage.folder]}; and {damage.folder}, which was made of what was there, is damaged "
            f"({damage.what}); put the text back, and then delete that folder"
        ) from None


def _locate_lost_source(source: Source, recipe: dict[str, Any], cache_dir: Path, error: LostCorpusError) -> Place:
    """Return the folder that was made of text which no longer exists.

    The text was at the source's path, or at the same path relative to the cache in a project that was moved since:

        source.path           recorded path     recorded from_cache   result
        /new/data/a.txt       /new/data/a.txt   (any)                 found, at its path
        /new/data/a.txt       /old/data/a.txt   ../data/a.txt         found, moved with the cache /old/cache to /new
        /new/data/a.txt       /old/text/a.txt   ../text/a.txt         not found; named in the error

    Raises:
        LostCorpusError: no folder fits, or several of different texts do; the message names similar folders.
    """
    path = source.path or ""
    paths = {_unicode(place) for place in (str(Path(path).absolute()), *candidate_paths(path))}
    from_cache_paths = {_unicode(os.path.relpath(place, cache_dir)) for place in paths}
    at_path: dict[str, Place] = {}
    moved: dict[str, Place] = {}
    of_other_paths, of_other_settings = [], []
    for folder, content in made_folders(cache_dir, source.name):
        made_with, origin = content["recipe"], content.get("origin")
        origin = origin if isinstance(origin, dict) else {}
        text_path = str(origin.get("path", _source_part(made_with).get("path")))
        parts = json.dumps([content.get(part) for part in PARTS], sort_keys=True)
        if _settings(made_with) != _settings(recipe):
            of_other_settings.append(f"{folder}, made with {_differences(_settings(made_with), _settings(recipe))}")
        elif text_path in paths:
            at_path[parts] = Place(folder, made_with, error, text_path)
        elif (from_cache := str(origin.get("from_cache"))) in from_cache_paths:
            present_path = os.path.normpath(cache_dir / from_cache)
            moved[parts] = Place(folder, made_with, error, present_path, f", when that was {text_path}")
        else:
            of_other_paths.append(f"{folder}, made of {text_path}")
    found = list((at_path or moved).values())
    if len(found) == 1:
        return found[0]
    if found:
        folders = _some([str(place.folder) for place in found])
        error.in_cache = (
            f"; the cache has several texts that were there: move away those that are not meant ({folders})"
        )
    elif of_other_paths:
        error.in_cache = (
            f"; the cache has {_some(of_other_paths)}: if that is the text, give this source that path, where nothing "
            "need be any more"
        )
    elif of_other_settings:
        error.in_cache = f"; the cache has {_some(of_other_settings)}: set that back, or the text is needed"
    raise error


def _source_part(recipe: Mapping[str, Any]) -> dict[str, Any]:
    source = recipe.get("source")
    return source if isinstance(source, dict) else {}


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe, by dotted key: all of it except the files and their place."""
    source = {key: value for key, value in _source_part(recipe).items() if key not in _FILE_KEYS}
    return flatten({**recipe, "source": source})


def _differences(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the settings in which a cached recipe differs from the wanted one: `seed 1 (here 0)`."""
    keys = [key for key in {**cached, **wanted} if cached.get(key) != wanted.get(key)]
    return ", ".join(f"{key.removeprefix('source.')} {cached.get(key)} (here {wanted.get(key)})" for key in keys)


def _some(folders: list[str]) -> str:
    more = f", and {len(folders) - _MOST_NAMED} more" if len(folders) > _MOST_NAMED else ""
    return shown("; ".join(folders[:_MOST_NAMED]) + more)


def _text(recipe: Mapping[str, Any]) -> str:
    """Return a text that is equal for equal recipes."""
    return json.dumps(recipe, sort_keys=True)


def _unicode(path: str) -> str:
    """Return a path as text that JSON can hold, because file names need not be UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
