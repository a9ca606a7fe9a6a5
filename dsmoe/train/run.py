"""From the command line to a finished run: `deepspeed launch/pretrain.py --config CONFIG [section.key=value ...]`.

Exit codes: 0 done, 2 somebody has to change something first (one message, no traceback), 75 stopped by a signal after a
checkpoint (the same command goes on from it), 1 anything else: also what may pass by itself, like a lock that is held.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dsmoe.engine.deepspeed_config import accepted_by_deepspeed
from dsmoe.exit_codes import DONE, STOPPED
from dsmoe.metrics.definitions import EVAL_BITS_PER_BYTE
from dsmoe.metrics.sinks import Sink
from dsmoe.parallel import Groups
from dsmoe.plan.elastic import adjustments
from dsmoe.plan.plan import Plan
from dsmoe.runtime.failure_exit import exit_stalled, report_failure
from dsmoe.runtime.failure_reports import FOLDER as FAILURES
from dsmoe.runtime.failure_reports import FailureReports, enable_flight_recorder, make_folder
from dsmoe.runtime.processes import (
    Rank,
    join_processes,
    leave_processes,
    quiet_deepspeed,
    run_on_all_ranks,
    run_on_rank_0,
)
from dsmoe.runtime.start import Start, begin, pretrain_parser
from dsmoe.runtime.watchdog import process_watchdog
from dsmoe.train.alike import run_fingerprint
from dsmoe.train.beginning import begin as begin_training
from dsmoe.train.environment import of_this_rank, write_environment
from dsmoe.train.evaluate import evaluate_bigram_model
from dsmoe.train.initialize import prepare_data
from dsmoe.train.run_files import forget_run
from dsmoe.train.run_folder import check_shared, claim_run_folder, make_run_folder, run_folder
from dsmoe.train.run_log import log_to_console, log_to_file, open_sinks, optional
from dsmoe.train.summary import summary
from dsmoe.train.trainer import Trainer, make_trainer

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0
"""Seconds that a failed rank waits for a checkpoint that is being written."""


def main(arguments: Sequence[str] | Start | None = None) -> int:
    """Train what the command line describes, or what launch/pretrain.py has read of it; returns the exit code."""
    start = arguments if isinstance(arguments, Start) else begin(pretrain_parser(), arguments)
    if not isinstance(arguments, Start) and (code := start.ended()) is not None:
        return code
    # Until there are reports, the stacks go to standard error, and the run goes on.
    faulthandler.register(signal.SIGQUIT)
    try:
        finished = pretrain(start.plan)
    except Exception as error:
        return report_failure(error)
    leave_processes()
    return DONE if finished else STOPPED


def pretrain(plan: Plan) -> bool:
    """Train by `plan` on the ranks that the launcher started; False if a signal has ended it before the last step."""
    folder = run_folder(plan.config)
    enable_flight_recorder(folder / FAILURES)
    rank = _join(plan)
    groups = Groups(plan.topology, plan.collective_timeout)
    settings = accepted_by_deepspeed(plan)  # before data that take hours are prepared
    run_on_rank_0(lambda: claim_run_folder(plan), f"looking at {folder}")
    sources = prepare_data(plan.config)
    is_new = not os.path.lexists(folder / "config.yaml")
    beginning, token = run_on_rank_0(lambda: make_run_folder(plan, sources), f"looking at {folder}")
    run_on_all_ranks(lambda: check_shared(folder, token), f"looking at {folder}")
    reports = FailureReports(run_on_rank_0(lambda: make_folder(folder / FAILURES)), process_watchdog())
    reports.install()
    _introduce(plan, rank, folder, settings)
    try:
        trainer = make_trainer(plan, groups, rank, folder / "checkpoints", sources, settings)
        resumed = begin_training(trainer, beginning)
    except Exception:
        if rank.is_first and is_new:
            forget_run(folder)
        raise
    if rank.device.type == "cuda":
        process_watchdog().watch_for_stalls(exit_stalled)
    trainer.sinks = open_sinks(plan.config, folder, trainer.step_index if resumed else -1) if rank.is_first else []
    finished = _train(trainer, folder)
    _close(trainer.sinks)
    reports.close()
    return finished


def _join(plan: Plan) -> Rank:
    """Join the other ranks of the run, which must have been given the same config."""
    rank = join_processes(
        plan.device_type, plan.collective_timeout, plan.config.cluster.interface, run_fingerprint(plan.given)
    )
    quiet_deepspeed()
    log_to_console(rank)
    return rank


def _introduce(plan: Plan, rank: Rank, folder: Path, settings: dict[str, object]) -> None:
    """Log what the run is, and record where it was made."""
    ranks = run_on_all_ranks(of_this_rank)
    if not rank.is_first:
        return
    log_to_file(folder)
    optional("environment.json", lambda: write_environment(folder, settings, ranks))
    logger.info("run %s in %s", plan.config.name, folder)
    for line in plan.introduction():
        logger.info("%s", line)
    if adjusted := adjustments(plan.given, plan.config):
        logger.info("elastic: %s", "; ".join(adjusted))


def _train(trainer: Trainer, folder: Path) -> bool:
    """Train, and wait for a checkpoint that is being written where that fails; False if a signal has ended it."""
    try:
        return _train_and_summarise(trainer, folder)
    except Exception:
        trainer.checkpoints.wait(SAVE_SECONDS)  # of all ranks, if they live: for the others this one's end is theirs
        raise


def _train_and_summarise(trainer: Trainer, folder: Path) -> bool:
    """Evaluate, train, and say what was learnt; False if a signal has ended it before."""
    plan, data = trainer.plan, trainer.data
    bigram = run_on_rank_0(
        lambda: optional("bigram model", lambda: evaluate_bigram_model(data.held_out, plan.config.model.vocab_size)),
        "counting the pairs of tokens of a bigram model",
    )
    if bigram:
        reached = bigram[EVAL_BITS_PER_BYTE.name]
        logger.info("a bigram model of the same tokens reaches %.3f bits/byte on the held-out text", reached)
    if trainer.step_index == 0:
        trainer.evaluate()
    finished = trainer.run()
    if skipped := trainer.skipped_steps():
        logger.warning("%s; the learning rate may be too high (optimizer.lr, optimizer.warmup_steps)", skipped)
    if not finished:
        logger.info("stopped after step %d; run the same command again to go on", trainer.step_index)
    elif trainer.rank.is_first:
        text = optional("summary", lambda: summary(folder, bigram, plan, data.held_out_text))
        logger.info("%s", text or "done")
    return finished


def _close(sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        with suppress(Exception):  # what it could not write has been said
            sink.close()
