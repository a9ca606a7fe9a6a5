"""Which folder of the cache has the tokens of a source: by what its text is, wherever that lies, or has lain."""

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
from dsmoe.config.paths import places_of_lost
from dsmoe.config.schema import Data, Source
from dsmoe.data.cache_meta import FORMAT_VERSION, PARTS, Origin, made_folders
from dsmoe.data.checksummed_files import DamagedCacheError
from dsmoe.data.corpora import corpus_state, names_and_sizes, source_state
from dsmoe.data.corpus_files import is_builtin
from dsmoe.data.source_errors import LostCopyError, LostCorpusError, shown
from dsmoe.data.tokenizer import Tokenizer

_OF_TEXT = ("path", "num_files", "files")
"""Of a recipe's source, what says which files they were, and where."""
_MOST_NAMED = 3
"""Folders of the cache that a message names."""


@dataclass(frozen=True)
class Place:
    """Where in the cache the tokens of a source are, or are to be."""

    folder: Path
    recipe: dict[str, Any]
    """Everything that decides what is in it."""
    lost: LostCorpusError | None = None
    """What has become of the text, if it is lost: then the folder is there."""
    lay: str = ""
    """Where lost text lay, or in a project that was moved, would lie now; absolute."""
    then: str = ""
    """That it lay elsewhere before the project was moved, for a message."""


def place_of(source: Source, tokenizer: Tokenizer, data: Data, cache_dir: Path) -> Place:
    """Find the folder of `source`, whose name follows from everything that decides what is in it.

    Raises:
        UserError: as `corpus_state`: the text is lost, and no folder was made of it, for one.
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
        return _place_of_lost(source, recipe, cache_dir, error)
    fingerprint = hashlib.sha256(_text(recipe).encode("utf-8")).hexdigest()[:16]
    return Place(cache_dir / f"{source.name}-{fingerprint}", recipe)


def folders_alike(source: Source, place: Place) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """The other folders that may have the tokens of a source, if its files were moved, copied or touched.

    All else is the same, and the names and sizes of the files are, where that was recorded, or their number. Yields the
    folder, its recipe and the digest of its text, which is empty where it was not recorded.
    """
    if not is_of_files(source):
        return
    files = names_and_sizes(source)
    for folder, content in made_folders(place.folder.parent, source.name):
        own, origin = content["recipe"], content.get("origin")
        then = origin.get("files") if isinstance(origin, dict) else files
        same_number = _source_of(own).get("num_files") == place.recipe["source"]["num_files"]
        if then == files and same_number and _settings(own) == _settings(place.recipe):
            yield folder, own, str(origin.get("blake2b", "")) if isinstance(origin, dict) else ""


def is_of_files(source: Source) -> bool:
    """Whether a source is a user's files."""
    return source.path is not None and not is_builtin(source)


def origin_of(source: Source, cache_dir: Path, digest: str) -> Origin | None:
    """What is recorded of the files of `source`, whose text has this `TextDigest`; None for what is no user's files."""
    if not is_of_files(source):
        return None
    path = str(Path(source.path or "").absolute())
    from_cache = os.path.relpath(path, cache_dir)
    return Origin(path=_unicode(path), from_cache=_unicode(from_cache), files=names_and_sizes(source), blake2b=digest)


def served_note(place: Place) -> str:
    """What is said where a folder of the cache stands for text that is lost."""
    return f"{place.lost}: its tokens are taken from {place.folder}, which was made of what was there{place.then}"


@contextmanager
def damage_of_copies(lost: Mapping[Path, LostCorpusError]) -> Iterator[None]:
    """Advise nobody to remove a damaged folder in which there is what is left of lost text; `lost` is by folder."""
    try:
        yield
    except DamagedCacheError as damage:
        if damage.folder not in lost:
            raise
        raise LostCopyError(
            f"{lost[damage.folder]}; and {damage.folder}, which was made of what was there, is damaged "
            f"({damage.what}); put the text back, and then delete that folder"
        ) from None


def _place_of_lost(source: Source, recipe: dict[str, Any], cache_dir: Path, error: LostCorpusError) -> Place:
    """The folder that was made of text which is not there any more.

    The text was at the very path, or, in a project that was moved, as far from the cache as that path is.

    Raises:
        LostCorpusError: there is none, or there are several of different texts; it says which look like it.
    """
    path = source.path or ""
    places = {_unicode(place) for place in (str(Path(path).absolute()), *places_of_lost(path))}
    far = {_unicode(os.path.relpath(place, cache_dir)) for place in places}
    there: dict[str, Place] = {}
    moved: dict[str, Place] = {}
    elsewhere, otherwise = [], []
    for folder, content in made_folders(cache_dir, source.name):
        own, origin = content["recipe"], content.get("origin")
        origin = origin if isinstance(origin, dict) else {}
        lay = str(origin.get("path", _source_of(own).get("path")))
        parts = json.dumps([content.get(part) for part in PARTS], sort_keys=True)
        if _settings(own) != _settings(recipe):
            otherwise.append(f"{folder}, made with {_differences(_settings(own), _settings(recipe))}")
        elif lay in places:
            there[parts] = Place(folder, own, error, lay)
        elif (from_cache := str(origin.get("from_cache"))) in far:
            here = os.path.normpath(cache_dir / from_cache)
            moved[parts] = Place(folder, own, error, here, f", when that was {lay}")
        else:
            elsewhere.append(f"{folder}, made of {lay}")
    found = list((there or moved).values())
    if len(found) == 1:
        return found[0]
    if found:
        folders = _some([str(place.folder) for place in found])
        error.in_cache = (
            f"; the cache has several texts that were there: move away those that are not meant ({folders})"
        )
    elif elsewhere:
        error.in_cache = (
            f"; the cache has {_some(elsewhere)}: if that is the text, give this source that path, where nothing need "
            "be any more"
        )
    elif otherwise:
        error.in_cache = f"; the cache has {_some(otherwise)}: set that back, or the text is needed"
    raise error


def _source_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    source = recipe.get("source")
    return source if isinstance(source, dict) else {}


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says besides the files and where they were, by dotted key."""
    source = {key: value for key, value in _source_of(recipe).items() if key not in _OF_TEXT}
    return flatten({**recipe, "source": source})


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What one recipe says and the other does not: `seed 1 (here 0)`."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return ", ".join(f"{key.removeprefix('source.')} {there.get(key)} (here {here.get(key)})" for key in keys)


def _some(folders: list[str]) -> str:
    more = f", and {len(folders) - _MOST_NAMED} more" if len(folders) > _MOST_NAMED else ""
    return shown("; ".join(folders[:_MOST_NAMED]) + more)


def _text(recipe: Mapping[str, Any]) -> str:
    """The same for equal recipes."""
    return json.dumps(recipe, sort_keys=True)


def _unicode(path: str) -> str:
    """A path that JSON has: names need not be UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
