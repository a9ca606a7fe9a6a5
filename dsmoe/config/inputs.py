"""Whether the files that a config names, corpora aside, can be read: for `dsmoe config check`. No torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from dsmoe.config.end_of_document import candidates, end_token, no_end_token
from dsmoe.config.errors import Problem, UserError
from dsmoe.config.partial import UnsoundError
from dsmoe.config.paths import NO_PATHS
from dsmoe.config.schema import Config

_CHECKPOINT = re.compile(r"/step_[0-9]+/manifest\.json$")


def input_problems(config: Config) -> list[Problem]:
    """Return what is missing, cannot be read, or is a tokenizer of more tokens than the model has.

    The corpora are for `dsmoe.data.check`.
    """
    problems: list[Problem] = []
    for check in _CHECKS:
        with suppress(UnsoundError):
            problems.extend(check(config))
    return problems


def _tokenizer(config: Config) -> Iterator[Problem]:
    key, path = "data.tokenizer", config.data.tokenizer
    if path in NO_PATHS[key]:
        return
    if Path(path).is_dir():
        inside = Path(path) / "tokenizer.json"
        hint = f"did you mean {inside}?" if inside.is_file() else "give a tokenizer.json"
        yield key, f"{key}: {path} is a folder; {hint}"
        return
    unreadable = list(_unreadable(key, path))
    yield from unreadable
    if unreadable:
        return
    try:
        content = json.loads(Path(path).read_bytes())
        tokens, special = _vocabulary(content), _special(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        yield key, f"{key}: {path} is not a JSON file of the `tokenizers` library; give `bytes` or a tokenizer.json"
        return
    size = max(tokens.values(), default=-1) + 1
    if size > config.model.vocab_size:
        yield (
            "model.vocab_size",
            f"model.vocab_size ({config.model.vocab_size}) is smaller than the vocabulary of data.tokenizer {path} "
            f"({size}); set model.vocab_size to {size} or more",
        )
    try:
        if end_token(tokens, config.data.end_of_document, f"{key} {path}", special) is None:
            yield "data.end_of_document", no_end_token(path, special)
    except UserError as error:
        yield "data.end_of_document", str(error)


def _vocabulary(content: dict[str, object]) -> dict[str, int]:
    """The tokens of a tokenizer.json: those of its model, and those that were added."""
    model, added = content["model"], content.get("added_tokens") or []
    assert isinstance(model, dict)
    assert isinstance(added, list)
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # a unigram model's: [token, score] each
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: int(token["id"]) for token in added}}


def _special(content: dict[str, list[dict[str, str]]]) -> str:
    """Of the tokens that were added, those that may end a document, for a message."""
    return candidates(token["content"] for token in content.get("added_tokens") or [] if token.get("special"))


def _hostfile(config: Config) -> Iterator[Problem]:
    if config.cluster.hostfile is not None:
        yield from _unreadable("cluster.hostfile", config.cluster.hostfile)


def _checkpoints(config: Config) -> Iterator[Problem]:
    for key, path in (
        ("checkpoint.resume", config.checkpoint.resume),
        ("checkpoint.weights_from", config.checkpoint.weights_from),
    ):
        if path is None or path in NO_PATHS.get(key, ()):
            continue
        unreadable = list(_unreadable(key, path))
        yield from unreadable
        folder = Path(path)
        if unreadable or (folder / "manifest.json").is_file():
            continue
        saved = folder / "checkpoints"
        if not saved.is_dir():
            yield key, f"{key}: {path} is neither a checkpoint nor a run's folder"
        elif not os.access(saved, os.R_OK | os.X_OK):
            yield key, f"{key}: {saved} cannot be read: permission denied"
        elif not any(map(_CHECKPOINT.search, map(str, saved.glob("step_*/manifest.json")))):
            yield key, f"{key} is the folder of a run, {path}, that has no whole checkpoint"


def _unreadable(key: str, path: str) -> Iterator[Problem]:
    if not os.path.exists(path):
        yield key, f"{key}: there is no file or folder {path}{_where(path)}"
    elif not os.access(path, os.R_OK):
        yield key, f"{key}: {path} cannot be read: permission denied"


def _where(path: str) -> str:
    return "" if os.path.isabs(path) else " in this folder, or beside the YAML file"


_CHECKS: tuple[Callable[[Config], Iterator[Problem]], ...] = (_tokenizer, _hostfile, _checkpoints)
