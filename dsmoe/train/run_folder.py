"""The run folder: whose it is, and what a run begins with. It is locked before it is looked at."""

from __future__ import annotations

import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.folder import Found, all_checkpoints, inspect, look, step_of
from dsmoe.checkpoint.manifest import MANIFEST, DamagedError, Manifest
from dsmoe.checkpoint.retention import set_aside
from dsmoe.config import load_config
from dsmoe.config.dump import dump_config, flatten
from dsmoe.config.effects import level_of_change
from dsmoe.config.errors import ConfigError, PassingError, UserError, describe, exit_code_of, system_error
from dsmoe.config.paths import PATH_KEYWORDS, is_path, unset_variables_note
from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource
from dsmoe.plan.plan import Plan
from dsmoe.plan.text import shown
from dsmoe.runtime.atomic_files import remove_leftovers, write_whole
from dsmoe.runtime.file_locks import HeldError, Lock, take
from dsmoe.train.changed import saved_tokenizer
from dsmoe.train.chosen import changed_settings, check_model, check_order
from dsmoe.train.identity import Contents, Difference, changed_values, differences, of_other_tokenizer, with_places
from dsmoe.train.run_files import LOCK, TOKEN, refuse_special

logger = logging.getLogger(__name__)

LOOKS = (1.0, 4.0)
"""Seconds before each further look at checkpoints that could not be read."""
_held: dict[Path, Lock] = {}
"""Locks of this process: they are let go of when it ends."""


def run_folder(config: Config) -> Path:
    """`runs_dir/name`."""
    return Path(config.runs_dir) / config.name


def free_name(config: Config) -> str:
    """A name like the run's, under which there is no run yet: `small-2`."""
    number = 2
    while os.path.lexists(Path(config.runs_dir) / f"{config.name}-{number}"):
        number += 1
    return f"{config.name}-{number}"


@dataclass(frozen=True)
class Beginning:
    """The checkpoints that a run can begin with, in the order of preference."""

    checkpoints: tuple[Path, ...] = ()
    """To go on from, newest first: each has all of its files, and the first undamaged one is taken."""
    passed_over: tuple[str, ...] = ()
    """Why others are not among them."""
    damaged: tuple[Path, ...] = ()
    """Other checkpoints that are known to be damaged."""
    weights: Path | None = None
    """Else a checkpoint whose weights are taken."""
    notes: tuple[str, ...] = ()
    """Further lines for the log."""


def claim_run_folder(plan: Plan) -> None:
    """Take the folder for this process if it is there, then check it: nothing is prepared for a run that is refused.

    Raises:
        PassingError: another process is training in it.
        UserError: as `check_run_folder`.
    """
    folder, start = run_folder(plan.given), plan.given.checkpoint
    if folder.is_dir():
        _lock(folder)
        check_run_folder(plan)
    elif start.resume not in ("auto", "never") or start.weights_from:
        check_run_folder(plan)


def make_run_folder(plan: Plan, sources: Sequence[PreparedSource]) -> tuple[Beginning, str]:
    """Make the folder, take it for this process, check it and the order of its text, and write `config.yaml`.

    Returns:
        What to begin with, and a token that `check_shared` wants.

    Raises:
        PassingError: another process is training in it.
        UserError: as `check_run_folder`, or it cannot be written.
    """
    config, folder = plan.given, run_folder(plan.given)
    token = uuid.uuid4().hex
    try:
        if not folder.is_dir():  # nothing is made for a run that is refused
            check_order(check_run_folder(plan, sources).checkpoints, plan, sources)
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        beginning = check_run_folder(plan, sources)
        check_order(beginning.checkpoints, plan, sources)
        remove_leftovers(folder)
        contents = Contents.of_run(config, sources, _resumed(config))
        write_whole(folder / "config.yaml", dump_config(with_places(config, sources)))
        contents.write(folder)
        write_whole(folder / TOKEN, token)
    except OSError as error:
        raise system_error(
            f"cannot write the run folder {folder.absolute()}: {describe(error)}; see runs_dir", error
        ) from None
    return beginning, token


def check_run_folder(plan: Plan, sources: Sequence[PreparedSource] | None = None) -> Beginning:
    """Check that the folder is this run's, and return what to begin with; writes nothing.

    Of a folder that another process trains in, what it says may be wrong a moment later: lock it first. Where `sources`
    is not given, text in another place is taken for the same.

    Raises:
        UserError: the folder holds the run of another config, or `checkpoint.resume` asks for what is not there, or is
            of another model.
        PassingError: storage does not answer now.
    """
    config, folder = plan.given, run_folder(plan.given)
    refuse_special(folder)
    found = _look(folder / "checkpoints")
    before, notes = _config_before(folder / "config.yaml", found)
    contents = _contents_before(folder, found)
    differing = differences(config, before, contents, bool(found.whole or found.passed_over), sources)
    if differing:
        raise UserError(_of_another_config(config, folder, found, differing))
    notes += [
        f"changed since the run was last started: {key}, {old} -> {new}"
        for key, old, new in changed_values(before, config)
        if not (is_path(key, old) or is_path(key, new))
    ]
    resumed_before = before.get("checkpoint.resume")

    def is_again(chosen: Path) -> bool:
        return contents.is_resumed_again(resumed_before, config.checkpoint.resume, chosen)

    beginning = replace(_beginning(config, folder / "checkpoints", found, is_again), notes=tuple(notes))
    weights = None if beginning.checkpoints else beginning.weights
    if weights is not None:
        saved = saved_tokenizer(_chosen("checkpoint.weights_from", weights).facts)
        told = of_other_tokenizer(config, weights, saved)
        beginning = replace(beginning, notes=(*beginning.notes, *told))
    check_model(beginning.checkpoints, weights, config)
    if beginning.checkpoints:
        newest, batch = beginning.checkpoints[0], plan.batch
        if newest not in found.whole:  # another run's
            beginning = replace(beginning, notes=(*beginning.notes, *changed_settings(newest, config)))
        done = inspect(newest).facts.step
        if done > batch.steps:
            longer = f"train.steps={done}" if config.train.steps else f"train.tokens={done * batch.tokens_per_step}"
            raise UserError(
                f"{newest} is past this config's last step, {batch.steps}; set {longer} or more, or give this run "
                f"another name (name={free_name(config)})"
            )
    return beginning


def check_shared(folder: Path, token: str) -> None:
    """Check that this rank sees the very folder that rank 0 made: checkpoints need one for all nodes.

    Raises:
        UserError: it does not.
    """
    file = folder / TOKEN
    for _ in range(50):  # a network file system may show a new file late
        try:
            if file.read_text(encoding="utf-8") == token:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    raise UserError(
        f"on {platform.node()}, {folder.absolute()} is not the folder that rank 0 made; runs_dir must be on storage "
        f"that all nodes share"
    )


def set_later_aside(folder: Path, step: int, damaged: Iterable[Path]) -> list[Path]:
    """Rename the checkpoints after `step`, where a run goes on because these are damaged; returns their new paths.

    Raises:
        PassingError: there is a later one of which that is not known: it may be whole, and is not to be lost.
    """
    later = [checkpoint for checkpoint in all_checkpoints(folder) if step_of(checkpoint) > step]
    unknown = sorted(set(later) - set(damaged))
    if unknown:
        raise PassingError(
            f"{unknown[-1]} is later than step {step}, from which the run was to go on, and nothing is known to be "
            f"wrong with it: it could not be read, or has come since. Nothing was changed; start the run again"
        )
    return set_aside(later)


def _lock(folder: Path) -> None:
    try:
        _take(folder / LOCK)
    except OSError as error:
        advice = "; see that its owner is who trains, or name another folder (runs_dir=...)"
        raise system_error(
            f"cannot lock the run folder {folder.absolute()}: {describe(error)}{advice}", error
        ) from None


def _take(path: Path) -> None:
    """Hold the lock at `path` for as long as this process lives; the system lets go of it however the process ends."""
    place = path.parent.resolve() / path.name
    held = _held.get(place)
    if held is not None and held.is_in_place:
        return
    try:
        lock = take(place)
    except HeldError:
        raise PassingError(
            f"another process is training in {path.parent}; wait for it, or give this run another name (name=...)"
        ) from None
    if not lock.works:
        logger.warning(
            "%s is on a file system without locks (flock): nothing keeps a second start of this run from writing over "
            "the first one's files; start it once at a time",
            path.parent,
        )
    _held[place] = lock


def _look(folder: Path) -> Found:
    """The checkpoints of a run, when it is known what the newest one is.

    Raises:
        UserError: it cannot be read; with exit code 1 where that may pass.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is to be a folder of checkpoints, and is a file or a link to nothing; move it away")
    for pause in LOOKS:
        try:
            found = look(folder)
            if _first_unknown(found) is None:
                return found
        except OSError:
            pass
        time.sleep(pause)
    try:
        found = look(folder)
    except OSError as error:
        raise system_error(f"cannot read the checkpoints in {describe(error)}", error) from None
    unknown = _first_unknown(found)
    if unknown is not None:
        problem = found.unreadable[unknown]
        refusal = UserError(
            f"{problem}. It may be whole, and is newer than all that can be read: nothing was changed. Start the run "
            f"again when the storage answers, or move {unknown} away to go on from an earlier one"
        )
        refusal.exit_code = problem.exit_code
        raise refusal
    return found


def _first_unknown(found: Found) -> Path | None:
    """The newest checkpoint, where nobody knows now whether it is one."""
    newest = max(map(step_of, found.whole), default=-1)
    return next((path for path in found.unreadable if step_of(path) > newest), None)


def _config_before(file: Path, found: Found) -> tuple[dict[str, Any], list[str]]:
    """The run's config as it was last started with, flattened, and what is to be said of where it comes from.

    A file that cannot be read is no reason to refuse the run: its newest checkpoint has the config as well. Of that,
    which may be of another version of dsmoe, only keys count that both have. Empty where there is no run yet.
    """
    if not os.path.lexists(file):
        return {}, []
    try:
        return flatten(load_config(file).model_dump(mode="json")), []
    except ConfigError as error:
        what = error.problems[0]
    newest = next(iter(found.whole), None)
    if newest is None:
        return {}, [f"{file} cannot be used ({what}), and there is no checkpoint: the run begins with the config given"]
    note = f"{file} cannot be used ({what}): the config in {newest} is compared instead, and the file written anew"
    saved = flatten(found.whole[newest].facts.config)
    return {key: value for key, value in saved.items() if key != "name"}, [note]


def _contents_before(folder: Path, found: Found) -> Contents:
    """The contents behind the paths of the run's config at its last start, by its folder or its newest checkpoint."""
    contents = Contents.read(folder)
    saved = [tokenizer for manifest in found.whole.values() if (tokenizer := saved_tokenizer(manifest.facts))]
    return contents.model_copy(update={"tokenizer": saved[0]}) if saved else contents


def _resumed(config: Config) -> Path | None:
    """The checkpoint that `checkpoint.resume` leads to; None where it is no path."""
    resume = config.checkpoint.resume
    if resume in PATH_KEYWORDS["checkpoint.resume"]:
        return None
    return _checkpoint_at("checkpoint.resume", Path(resume))


def _beginning(config: Config, folder: Path, found: Found, is_again: Callable[[Path], bool]) -> Beginning:
    """Choose what to begin with; `is_again` tells whether the run has begun with this `checkpoint.resume` before."""
    resume, whole, passed_over = config.checkpoint.resume, list(found.whole), tuple(found.passed_over.values())
    weights_from = config.checkpoint.weights_from
    weights = _checkpoint_at("checkpoint.weights_from", Path(weights_from)) if weights_from else None
    if resume == "never" and (whole or passed_over):
        newest = max((*whole, *found.passed_over), key=step_of)
        raise UserError(
            f"checkpoint.resume is 'never' and {newest} is there; set checkpoint.resume: auto to "
            f"go on from it, or give this run another name (name={free_name(config)})"
        )
    if resume in ("auto", "always", "never"):
        if passed_over and not whole:
            raise UserError(
                f"no checkpoint in {folder} is whole: {'; '.join(passed_over)}. Remove them to begin anew, or give "
                f"this run another name (name={free_name(config)})"
            )
        if resume == "always" and not whole:
            raise UserError(f"checkpoint.resume is 'always' and there is no whole checkpoint in {folder}")
        return Beginning(tuple(whole), passed_over, tuple(found.damaged), weights)
    chosen = _checkpoint_at("checkpoint.resume", Path(resume))
    step = _chosen("checkpoint.resume", chosen).facts.step
    if whole and step_of(whole[0]) > step and is_again(chosen):  # the same command, after a stop
        return Beginning((*whole, chosen), passed_over, tuple(found.damaged))
    later = [str(checkpoint) for checkpoint in whole if step_of(checkpoint) > step]
    if later:
        raise UserError(
            f"checkpoint.resume is {resume}, step {step}, and this run has a later one, {later[0]}: it would be taken "
            f"for the newest afterwards. To go back, remove {' '.join(later)}; or give this run another name "
            f"(name={free_name(config)})"
        )
    return Beginning((chosen,), passed_over, tuple(found.damaged))


def _checkpoint_at(key: str, path: Path) -> Path:
    """The checkpoint at a path: itself, or a run's newest one that has all of its files.

    Raises:
        UserError: it is a run's folder without one.
    """
    folder = path / "checkpoints"
    if (path / MANIFEST).exists() or not folder.is_dir():
        return path
    found = _look(folder)
    if not found.whole:
        reasons = f": {'; '.join(found.passed_over.values())}" if found.passed_over else ""
        raise UserError(f"{key} is the folder of a run, {path}, that has no whole checkpoint{reasons}")
    return next(iter(found.whole))


def _chosen(key: str, checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint that the config names."""
    try:
        return inspect(checkpoint)
    except DamagedError as error:
        refusal = UserError(f"{key}: {error}{unset_variables_note(str(checkpoint))}")
        refusal.exit_code = exit_code_of(error)
        raise refusal from None


def _of_another_config(config: Config, folder: Path, found: Found, differing: Sequence[Difference]) -> str:
    """Name the differing keys and the ways out: the old values, or another run with this one's state or without."""
    text = shown("; ".join(f"{key} is {old} there and {new} here" for key, old, new in differing))
    levels = {level_of_change(*difference) for difference in differing}
    newest = next(iter(found.whole), None)
    name = f"name={free_name(config)}"
    if newest is None or "tensor" in levels:  # no checkpoint is of use
        return f"{folder} belongs to another config: {text}. Set them back, or give this run another name ({name})"
    onward = f"{name} checkpoint.resume={newest} goes on from its newest checkpoint"
    if "step" in levels:
        onward = f"{name} checkpoint.weights_from={newest} begins with its newest weights"
    return (
        f"{folder} belongs to another config: {text}. Set them back, or give this run another name: {onward}, and "
        f"{name} alone begins anew"
    )
