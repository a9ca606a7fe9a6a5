"""From the command line to a finished run: `deepspeed launch/pretrain.py --config CONFIG [section.key=value ...]`.

Exit codes: 0 done, 2 somebody has to change something first (one message, no traceback), 75 stopped by a signal after a
checkpoint (the same command goes on from it), 1 anything else: also what may pass by itself, like a lock that is held.
"""

from __future__ import annotations

import faulthandler
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

from dsmoe.checkpoint.folder import all_checkpoints
from dsmoe.checkpoint.manifest import DamagedError, UnreadableError
from dsmoe.config.deepspeed import to_deepspeed
from dsmoe.config.errors import UserError, describe
from dsmoe.config.schema import Config
from dsmoe.exit_codes import DONE, STOPPED
from dsmoe.metrics import JsonLines, Sink, TensorBoard
from dsmoe.parallel import Groups
from dsmoe.plan.devices import resolve_device
from dsmoe.plan.elastic import adjustments
from dsmoe.plan.plan import Plan
from dsmoe.plan.text import shown
from dsmoe.runtime.failure_exit import end_stalled, ended_by
from dsmoe.runtime.failure_reports import FOLDER as FAILURES
from dsmoe.runtime.failure_reports import Reports, make_folder, record_collectives
from dsmoe.runtime.processes import Rank, join_processes, leave_processes, on_every_rank, on_first_rank, quiet_deepspeed
from dsmoe.runtime.start import Start, begin, pretrain_program
from dsmoe.runtime.watchdog import process_watch
from dsmoe.runtime.world import for_this_world
from dsmoe.train.alike import claims_of_run
from dsmoe.train.environment import of_this_rank, write_environment
from dsmoe.train.evaluate import evaluate_bigram_model
from dsmoe.train.initialize import prepare_data
from dsmoe.train.run_files import forget_run
from dsmoe.train.run_folder import (
    Beginning,
    check_shared,
    claim_run_folder,
    free_name,
    make_run_folder,
    run_folder,
    set_later_aside,
)
from dsmoe.train.summary import BITS_PER_BYTE, summary
from dsmoe.train.trainer import Trainer

T = TypeVar("T")

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0
"""How long a rank that has failed waits for a checkpoint that is being written."""


def main(arguments: Sequence[str] | Start | None = None) -> int:
    """Train what the command line describes, or what launch/pretrain.py has read of it; returns the exit code."""
    start = arguments if isinstance(arguments, Start) else begin(pretrain_program(), arguments)
    if not isinstance(arguments, Start) and (code := start.ended()) is not None:
        return code
    # Until there are reports, the stacks go to standard error, and the run goes on.
    faulthandler.register(signal.SIGQUIT)
    try:
        finished = pretrain(start.given)
    except Exception as error:
        return ended_by(error)
    leave_processes()
    return DONE if finished else STOPPED


def pretrain(given: Config) -> bool:
    """Train `given` on the ranks that the launcher started; False if a signal has ended it before the last step."""
    config = for_this_world(given)
    plan = Plan.from_config(config)
    facts = resolve_device(config.cluster.device)
    timeout = timedelta(seconds=config.cluster.collective_timeout_seconds)
    device = "cpu" if facts is not None and facts.name == "cpu" else "cuda"
    folder = run_folder(config)
    record_collectives(folder / FAILURES)
    rank = join_processes(device, timeout, config.cluster.interface, claims_of_run(given))
    quiet_deepspeed()
    _log_to_console(rank)
    groups = Groups(plan.topology, timeout)
    on_first_rank(lambda: claim_run_folder(given), f"looking at {folder}")
    sources = prepare_data(config)
    is_new = not os.path.lexists(folder / "config.yaml")
    beginning, token = on_first_rank(lambda: make_run_folder(given, sources), f"looking at {folder}")
    on_every_rank(lambda: check_shared(folder, token), f"looking at {folder}")
    reports = Reports(on_first_rank(lambda: make_folder(folder / FAILURES)), process_watch())
    reports.listen()
    ranks = on_every_rank(of_this_rank)
    if rank.is_first:
        _report("train.log", lambda: logging.getLogger("dsmoe").addHandler(_handler(LogFile(folder / "train.log"))))
        ds_config = to_deepspeed(config, plan.batch.accumulation_steps)
        _report("environment.json", lambda: write_environment(folder, ds_config, ranks))
        logger.info("run %s in %s", config.name, folder)
        for line in plan.introduction():
            logger.info("%s", line)
        if adjusted := adjustments(given, config):
            logger.info("elastic: %s", "; ".join(adjusted))
    try:
        trainer = Trainer(config, groups, rank, folder / "checkpoints", sources)
        resumed = _begin(trainer, beginning)
    except Exception:
        if rank.is_first and is_new:
            forget_run(folder)
        raise
    if rank.device.type == "cuda":
        process_watch().end_stalls(end_stalled)
    trainer.sinks = _sinks(config, folder, trainer.step_index if resumed else -1) if rank.is_first else []
    try:
        finished = _train_and_tell(trainer, folder)
    except Exception:
        trainer.checkpoints.wait(SAVE_SECONDS)  # of all ranks, if they live: for the others this one's end is theirs
        raise
    for sink in trainer.sinks:
        with suppress(Exception):  # what it could not write has been said
            sink.close()
    reports.close()
    return finished


def _report(what: str, make: Callable[[], T]) -> T | None:
    """What `make` returns, or None where it fails: no report is a reason for a run to end, or to end otherwise."""
    try:
        return make()
    except Exception as error:
        reason = describe(error) if isinstance(error, OSError) else repr(error)
        logger.error("no %s (%s); training goes on without", what, reason)
        return None


def _begin(trainer: Trainer, beginning: Beginning) -> bool:
    """Go on from the newest undamaged checkpoint, and say why from no newer one; returns whether there was one."""
    for note in beginning.notes:
        logger.warning("%s", shown(note))
    for reason in beginning.passed_over:
        logger.warning("passed over: %s", reason)
    damaged: list[Path] = list(beginning.damaged)
    last, last_tried = None, Path()
    for checkpoint in beginning.checkpoints:
        try:
            trainer.resume(checkpoint)
        except UnreadableError:
            raise  # it may be whole
        except DamagedError as error:  # on every rank alike; another one is loaded over it, if any of it was
            logger.warning("passed over: %s", error)
            damaged.append(checkpoint)
            last, last_tried = error, checkpoint
            continue
        logger.info("continuing from %s", checkpoint)
        for path in on_first_rank(lambda: set_later_aside(trainer.checkpoints.folder, trainer.step_index, damaged)):
            logger.warning("set aside: %s", path)
        return True
    if last is not None and last_tried.parent.absolute() != trainer.checkpoints.folder.absolute():
        _refuse("checkpoint.resume", last_tried, last)
    if last is not None:
        raise UserError(
            f"there is no checkpoint in {trainer.checkpoints.folder} to go on from: {last}. Move them away to begin "
            f"anew, or give this run another name (name={free_name(trainer.config)})"
        )
    if beginning.weights is not None:
        try:
            trainer.take_weights(beginning.weights)
        except UnreadableError:
            raise
        except DamagedError as error:
            _refuse("checkpoint.weights_from", beginning.weights, error)
        logger.info("beginning with the weights of %s", beginning.weights)
    return False


def _refuse(key: str, checkpoint: Path, error: DamagedError) -> NoReturn:
    """Refuse the checkpoint that a key names, on all ranks alike, of which one speaks."""

    def refuse() -> None:
        earlier: list[Path] = []
        with suppress(OSError, ValueError):  # no other checkpoints, or this one is not called like one
            there = all_checkpoints(checkpoint.parent)
            earlier = there[: there.index(checkpoint)]
        which = f" ({key}={earlier[-1]})" if earlier else ", or one of another run"
        raise UserError(f"{key}: {error}; name an earlier checkpoint{which}")

    on_first_rank(refuse)
    raise error  # not reached: every rank has raised the refusal


def _train_and_tell(trainer: Trainer, folder: Path) -> bool:
    """Evaluate, train, and say what was learnt; False if a signal has ended it before."""
    bigram = on_first_rank(
        lambda: _report(
            "bigram model", lambda: evaluate_bigram_model(trainer.held_out, trainer.config.model.vocab_size)
        ),
        "counting the pairs of tokens of a bigram model",
    )
    if bigram:
        reached = bigram[BITS_PER_BYTE]
        logger.info("a bigram model of the same tokens reaches %.3f bits/byte on the held-out text", reached)
    if trainer.step_index == 0:
        trainer.evaluate()
    finished = trainer.run()
    if skipped := trainer.skipped_steps():
        logger.warning("%s; the learning rate may be too high (optimizer.lr, optimizer.warmup_steps)", skipped)
    if not finished:
        logger.info("stopped after step %d; run the same command again to go on", trainer.step_index)
    elif trainer.rank.is_first:
        logger.info(
            "%s", _report("summary", lambda: summary(folder, bigram, trainer.config, trainer.held_out_text)) or "done"
        )
    return finished


def _sinks(config: Config, folder: Path, resume_step: int) -> list[Sink]:
    lines = _report("metrics.jsonl", lambda: JsonLines(folder / "metrics.jsonl", resume_step))
    events = None
    if config.observe.tensorboard:
        events = _report("tensorboard", lambda: TensorBoard(folder / "tensorboard", resume_step))
    return [sink for sink in (lines, events) if sink is not None]


def _log_to_console(rank: Rank) -> None:
    """Let rank 0 speak on standard output; the others only of trouble."""
    logging.raiseExceptions = False  # that a full disk takes no more of the log needs no traceback for each line
    package = logging.getLogger("dsmoe")
    package.setLevel(logging.INFO if rank.is_first else logging.ERROR)
    package.propagate = False
    package.addHandler(_handler(logging.StreamHandler(sys.stdout)))


class LogFile(logging.handlers.WatchedFileHandler):
    """The run's log, opened again where it was moved or removed; storage that fails loses lines, and nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line, if that can be done."""
        with suppress(OSError):
            super().emit(record)


def _handler(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler
