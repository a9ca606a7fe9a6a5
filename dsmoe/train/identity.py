"""The identity of a run: its settings, and for paths their contents rather than their spelling."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dsmoe.checkpoint.manifest import MANIFEST
from dsmoe.config.dump import flatten, with_nulls_resolved
from dsmoe.config.effects import is_free
from dsmoe.config.paths import is_path
from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource
from dsmoe.data.tokenizer import tokenizer_digest
from dsmoe.runtime.atomic_files import check_regular, write_whole

_ORDER_KEYS = ("data.sources", "data.seed", "data.validation_fraction")
"""Keys that may change besides free ones where `data.changed_order` accepts it, or where there are checkpoints:
`check_order` then decides."""
RECORD = ".contents.json"
ABSENT = "absent"

Difference = tuple[str, Any, Any]
"""A key, its value at the last start, and its value now."""


class _Recorded(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SourceContents(_Recorded):
    """The contents of one source."""

    path: str = ""
    """Absolute, links resolved; empty for what has none."""
    checksum: str


class Contents(_Recorded):
    """The contents behind the paths of a run's config at its last start; empty where they are not known."""

    tokenizer: str = ""
    """`tokenizer_digest`."""
    sources: dict[str, SourceContents] = {}
    resume: str = ""
    """The path of `checkpoint.resume`, absolute, links resolved."""
    manifest: str = ""
    """Digest of the manifest of the checkpoint that this led to."""

    @classmethod
    def of_run(cls, config: Config, sources: Sequence[PreparedSource], resumed: Path | None) -> Contents:
        """The contents of a run that starts now; `resumed` is the checkpoint that `checkpoint.resume` names, if any."""
        paths = {source.name: source.path for source in config.data.sources}
        return cls(
            tokenizer=tokenizer_digest(config),
            sources={
                source.name: SourceContents(path=real_path(paths[source.name]), checksum=source.checksum)
                for source in sources
            },
            resume="" if resumed is None else real_path(config.checkpoint.resume),
            manifest="" if resumed is None else manifest_digest(resumed),
        )

    @classmethod
    def read(cls, run: Path) -> Contents:
        """Read the contents from a run's folder; empty where they cannot be read: no reason to refuse the run."""
        try:
            check_regular(run / RECORD)
            return cls.model_validate(json.loads((run / RECORD).read_bytes()))
        except (OSError, ValueError, RecursionError):
            return cls()

    def write(self, run: Path) -> None:
        """Write the contents into a run's folder."""
        write_whole(run / RECORD, self.model_dump_json(indent=1) + "\n")

    def is_resumed_again(self, before: object, resume: str, chosen: Path) -> bool:
        """Return whether `checkpoint.resume` names the same checkpoint as at the last start, when it was `before`."""
        same_place = before == resume or (self.resume and self.resume == real_path(resume))
        return bool(same_place or (self.manifest and self.manifest == manifest_digest(chosen)))


def real_path(path: str | None) -> str:
    """Absolute, with links resolved; empty for None."""
    return "" if path is None else os.path.realpath(path)


def manifest_digest(checkpoint: Path) -> str:
    """Digest that identifies a checkpoint wherever its folder is; empty where it cannot be read."""
    try:
        check_regular(checkpoint / MANIFEST)
        return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def differences(
    config: Config,
    before: Mapping[str, Any],
    contents: Contents,
    has_checkpoints: bool,
    sources: Sequence[PreparedSource] | None = None,
) -> list[Difference]:
    """The keys by which `config` describes another run than `before`, with both values.

    Args:
        config: of this start.
        before: the config of the last start, flattened; empty where there is no run yet.
        contents: what its paths led to.
        has_checkpoints: then `check_order` decides about the order of the text.
        sources: what the paths of the sources lead to here, if that is known yet: those that have other paths are
            passed over until it is.
    """
    order = _ORDER_KEYS if has_checkpoints or config.data.changed_order == "accept" else ()
    accepted = tuple(f"{key}." for key in order)
    current = flatten(config.model_dump(mode="json"))
    checksums = None if sources is None else {source.name: source.checksum for source in sources}
    found: list[Difference] = []
    for key, old, now in _pairs(before, current):
        if is_free(key) or f"{key}.".startswith(accepted):
            continue
        if key == "data.tokenizer":
            found += _tokenizers(old, now, contents.tokenizer, tokenizer_digest(config))
        elif is_path(key, old) and is_path(key, now):
            name = str(current.get(f"{key.rpartition('.')[0]}.name"))
            checksum = None if checksums is None else checksums.get(name, "")
            if not _same_source(old, now, contents.sources.get(name), checksum):
                found.append((key, old, now))
        elif old != now:
            found.append((key, old, now))
    return found


def changed_values(before: Mapping[str, Any], config: Config) -> list[Difference]:
    """Each key whose values differ as they are written."""
    pairs = _pairs(before, flatten(config.model_dump(mode="json")))
    return [(key, old, now) for key, old, now in pairs if old != now]


def _pairs(before: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Difference]:
    """Key by key; where the config before is a checkpoint's, of perhaps another version, those that both have.

    Two values that say the same, as `num_kv_heads: null` and the number of heads, are given as the first.
    """
    spelled_before, spelled_now = with_nulls_resolved(before), with_nulls_resolved(current)
    keys = {**before, **current} if "name" in before else [key for key in before if key in current]
    for key in keys:
        old, now = before.get(key, ABSENT), current.get(key, ABSENT)
        yield key, old, old if spelled_before.get(key, ABSENT) == spelled_now.get(key, ABSENT) else now


def _tokenizers(old: Any, now: Any, old_digest: str, digest: str) -> list[Difference]:
    if not (old_digest and digest):  # not recorded, or there is no such file: preparing the data says so
        return [] if old == now or _same_place(old, now) else [("data.tokenizer", old, now)]
    if old_digest == digest:
        return []
    return [("data.tokenizer", _shown_tokenizer(old, old_digest), _shown_tokenizer(now, digest))]


def of_other_tokenizer(config: Config, checkpoint: Path, saved: str) -> list[str]:
    """Notes on initial weights of a model that was trained with the tokenizer of digest `saved`."""
    digest = tokenizer_digest(config)
    if not (saved and digest) or saved == digest:
        return []
    shown = _shown_tokenizer(config.data.tokenizer, digest)
    return [
        f"checkpoint.weights_from: {checkpoint} was trained with another tokenizer, {saved[:19]}, than {shown}: its "
        f"embedding is of other tokens"
    ]


def with_places(config: Config, sources: Sequence[PreparedSource]) -> Config:
    """The config with the paths at which lost text lay: those given may be from beside another file than the run's."""
    lay = {source.name: source.lost_path for source in sources if source.lost_path}
    working_folder = Path().absolute()
    entries = []
    for source in config.data.sources:
        path = Path(lay.get(source.name, ""))
        spelled = str(path.relative_to(working_folder)) if path.is_relative_to(working_folder) else str(path)
        entries.append(source.model_copy(update={"path": spelled}) if source.name in lay else source)
    data = config.data.model_copy(update={"sources": tuple(entries)})
    return config.model_copy(update={"data": data})


def _shown_tokenizer(path: str, digest: str) -> str:
    """A tokenizer for a message: `tok.json (sha256:9f86d081884c)`."""
    return path if path == digest else f"{path} ({digest[:19]})"


def _same_source(old: str, now: str, recorded: SourceContents | None, checksum: str | None) -> bool:
    if old == now or _same_place(old, now):
        return True
    if recorded is None:
        return False
    return recorded.path == real_path(now) or checksum is None or recorded.checksum == checksum


def _same_place(old: Any, now: Any) -> bool:
    return isinstance(old, str) and isinstance(now, str) and os.path.realpath(old) == os.path.realpath(now)
