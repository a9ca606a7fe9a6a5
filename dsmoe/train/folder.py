"""The run folder: whose it is, and what is written there besides metrics and checkpoints."""

from __future__ import annotations

import fcntl
import os
import platform
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from dsmoe.checkpoint.folder import all_checkpoints, candidates, inspect, step_of
from dsmoe.checkpoint.manifest import MANIFEST, DamagedError, Manifest
from dsmoe.config import load_config
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.config.show import dump_config, flatten
from dsmoe.plan.batch import Batch

# What may change when a run goes on: how long, how often, where. Everything else is the run's identity.
_CHANGEABLE = (
    "runs_dir",
    "cluster",
    "parallel",
    "checkpoint",
    "observe",
    "deepspeed",
    "data.cache_dir",
    "train.steps",
    "train.tokens",
    "train.eval_every",
    "train.eval_batches",
    "train.recompute",
    "train.micro_batch_size",
)
LOCK, TOKEN = ".lock", ".token"


def run_folder(config: Config) -> Path:
    """`runs_dir/name`."""
    return Path(config.runs_dir) / config.name


@dataclass(frozen=True)
class Beginning:
    """What a run can begin with, in the order of preference."""

    checkpoints: tuple[Path, ...] = ()
    """To go on from, newest first: each has all of its files, and the first undamaged one is taken."""
    passed_over: tuple[str, ...] = ()
    """Why newer ones are not among them."""
    weights: Path | None = None
    """Else a checkpoint whose weights are taken."""


def check_run_folder(config: Config) -> Beginning:
    """Check that the folder is this config's, and return what to begin with; writes nothing.

    Raises:
        UserError: the folder holds the run of another config, or `checkpoint.resume` asks for what is not there.
    """
    folder = run_folder(config)
    there = load_config(folder / "config.yaml") if (folder / "config.yaml").exists() else None
    if there is not None:
        differing = _differences(there, config)
        if differing:
            raise UserError(
                f"{folder} belongs to another config: {'; '.join(differing)}. Give this run another name "
                f"(name=...), or remove the folder"
            )
    is_again = there is not None and there.checkpoint.resume == config.checkpoint.resume
    beginning = _beginning(config, folder / "checkpoints", is_again)
    if beginning.checkpoints:
        newest, steps = beginning.checkpoints[0], Batch.from_config(config).steps
        if inspect(newest).facts.step > steps:
            raise UserError(
                f"{newest} is past this config's last step, {steps}; raise train.steps, or take another name"
            )
    elif beginning.weights is not None:
        _chosen("checkpoint.weights_from", beginning.weights)
    return beginning


def make_run_folder(config: Config) -> str:
    """Make the folder, take it for this process, write `config.yaml`, and return a token that `check_shared` wants.

    Raises:
        UserError: another process is training in it, or it cannot be written.
    """
    folder = run_folder(config)
    token = uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(folder / LOCK)
        replace_text(folder / "config.yaml", dump_config(config))
        replace_text(folder / TOKEN, token)
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder.absolute()}: {error.strerror}; see runs_dir") from None
    return token


def check_shared(folder: Path, token: str) -> None:
    """Check that this rank sees the very folder that rank 0 made: checkpoints need one for all nodes.

    Raises:
        UserError: it does not.
    """
    file = folder / TOKEN
    for _ in range(50):  # a network file system may show a new file late
        if file.exists() and file.read_text() == token:
            return
        time.sleep(0.2)
    raise UserError(
        f"on {platform.node()}, {folder.absolute()} is not the folder that rank 0 made; runs_dir must be on storage "
        f"that all nodes share"
    )


def _take(lock: Path) -> None:
    """Hold `lock` for as long as this process lives; the system lets go of it however the process ends."""
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is training in {lock.parent}; wait for it, or give this run another name (name=...)"
        ) from None


def _beginning(config: Config, folder: Path, is_again: bool) -> Beginning:
    """What to begin with; `is_again`, where the run has begun before, with the same `checkpoint.resume`."""
    resume = config.checkpoint.resume
    found, passed_over = candidates(folder)
    weights_from = config.checkpoint.weights_from
    weights = _checkpoint_at("checkpoint.weights_from", Path(weights_from)) if weights_from else None
    if resume == "never" and (found or passed_over):
        raise UserError(
            f"checkpoint.resume is 'never' and {all_checkpoints(folder)[-1]} is there; set checkpoint.resume: auto to "
            f"go on from it, or give this run another name"
        )
    if resume in ("auto", "always", "never"):
        if passed_over and not found:
            raise UserError(
                f"no checkpoint in {folder} is whole: {'; '.join(passed_over)}. Remove them to begin anew, or give "
                f"this run another name"
            )
        if resume == "always" and not found:
            raise UserError(f"checkpoint.resume is 'always' and there is no whole checkpoint in {folder}")
        return Beginning(tuple(found), tuple(passed_over), weights)
    chosen = _checkpoint_at("checkpoint.resume", Path(resume))
    step = _chosen("checkpoint.resume", chosen).facts.step
    if found and step_of(found[0]) > step and is_again:  # the same command, after a stop
        return Beginning((*found, chosen), tuple(passed_over))
    if found and step_of(found[0]) > step:
        raise UserError(
            f"checkpoint.resume is {resume}, step {step}, and this run has a later one, {found[0]}: it would be taken "
            f"for the newest afterwards. Remove it to go back, or give this run another name"
        )
    return Beginning((chosen,))


def _checkpoint_at(key: str, path: Path) -> Path:
    """The checkpoint at a path: itself, or a run's newest one that has all of its files.

    Raises:
        UserError: it is a run's folder without one.
    """
    folder = path / "checkpoints"
    if (path / MANIFEST).exists() or not folder.is_dir():
        return path
    found, passed_over = candidates(folder)
    if not found:
        reasons = f": {'; '.join(passed_over)}" if passed_over else ""
        raise UserError(f"{key} is the folder of a run, {path}, that has no whole checkpoint{reasons}")
    return found[0]


def _chosen(key: str, checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint that the config names."""
    try:
        return inspect(checkpoint)
    except DamagedError as error:
        raise UserError(f"{key}: {error}") from None


def _differences(there: Config, here: Config) -> list[str]:
    """Each key outside `_CHANGEABLE` whose values differ, as text."""
    old, new = flatten(there.model_dump()), flatten(here.model_dump())
    return [
        f"{key} is {old.get(key, 'absent')} there and {new.get(key, 'absent')} here"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and not f"{key}.".startswith(tuple(f"{free}." for free in _CHANGEABLE))
    ]


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
