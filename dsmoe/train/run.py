"""From the command line to a finished run: `deepspeed launch/pretrain.py --config CONFIG [section.key=value ...]`.

Exit codes: 0 done, 2 somebody has to change something first (one message, no traceback), 75 stopped by a signal after a
checkpoint (the same command goes on from it), 1 anything else: also what may pass by itself, like a lock that is held.
"""

from __future__ import annotations

import faulthandler
import logging
import logging.handlers
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch.distributed as dist

from dsmoe.checkpoint.folder import all_checkpoints
from dsmoe.checkpoint.manifest import DamagedError, UnreadableError
from dsmoe.config.deepspeed import to_deepspeed
from dsmoe.config.errors import HostError, UserError, describe, exit_code_of, located
from dsmoe.config.schema import Config
from dsmoe.exit_codes import DONE, FAILED, STOPPED
from dsmoe.launch.rendezvous import Rendezvous
from dsmoe.launch.speaker import LINGER_SECONDS, speaks_for_host
from dsmoe.launch.start import Start, begin, pretrain_program
from dsmoe.launch.world import for_this_world
from dsmoe.observe import JsonLines, Sink, TensorBoard
from dsmoe.parallel import Groups, Rank, join_processes, leave_processes
from dsmoe.parallel.claims import check_alike
from dsmoe.parallel.distributed import DeviceError, is_shared, on_every_rank, on_first_rank, quiet_deepspeed
from dsmoe.parallel.lost import LostRanksError
from dsmoe.parallel.roll import report_at_roll
from dsmoe.parallel.watch import GRACE_SECONDS, process_watch
from dsmoe.plan.devices import resolve_device
from dsmoe.plan.elastic import adjustments
from dsmoe.plan.report import Plan
from dsmoe.plan.text import shown
from dsmoe.train.alike import claims_of_data, claims_of_run
from dsmoe.train.engine import prepare_once
from dsmoe.train.environment import of_this_rank, write_environment
from dsmoe.train.evaluate import evaluate_bigram_model
from dsmoe.train.folder import (
    Beginning,
    check_shared,
    claim_run_folder,
    free_name,
    make_run_folder,
    run_folder,
    set_later_aside,
)
from dsmoe.train.reports import FOLDER as FAILURES
from dsmoe.train.reports import Reports, make_folder, record_collectives
from dsmoe.train.run_files import forget_run
from dsmoe.train.summary import BITS_PER_BYTE, summary
from dsmoe.train.trainer import Trainer, TrainingDivergedError

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


def ended_by(error: Exception) -> int:
    """Explain the error that ends this rank; returns the exit code.

    That is 2 for what is wrong wherever the ranks run, and 1 for what may not be so at another try or on other hosts.
    """
    if isinstance(error, (UserError, LostRanksError, TrainingDivergedError)):
        text = f"error: {error}"
    elif isinstance(error, OSError):  # where there is a run folder, the traceback is in its failures
        text = f"error: {located(error)}"
    else:
        text = "".join(traceback.format_exception(error))
    explain_end(error, text)
    return exit_code_of(error)


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
    sources = prepare_once(config)
    check_alike(claims_of_data(sources))
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
        trainer = Trainer(config, groups, rank, folder / "checkpoints")
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


def end_stalled(error: LostRanksError) -> None:
    """End this process from a thread, because the main one waits for a device that waits for ever."""
    explain_end(error, str(error))
    os._exit(FAILED)


def explain_end(error: Exception, text: str) -> None:
    """Print why this process ends, once for the whole run.

    The rank that fails first prints. The others, which then lose their connection to it, only say so: their own
    tracebacks would bury the cause. Where what failed is a collective, because other ranks are not there, it says
    which. Where the store has gone, with rank 0, they cannot agree, and one rank on each host prints. Whoever is not
    the speaker lingers, because launchers end every rank as soon as one has ended.
    """
    rank = Rendezvous.from_environment().rank or 0
    if not dist.is_initialized() or is_shared(error):
        if dist.is_initialized() and (reports := process_watch().reports) and not isinstance(error, UserError):
            reports.of_failure("all ranks have failed alike", error)
        _explain_alone(rank, error, text)
        return
    # A launcher that has seen another rank end asks this one to: not before it has said why.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch = process_watch()
    speaker = watch.speaker()
    if watch.reports:
        watch.reports.of_failure("it has failed" if speaker == rank else "a collective failed", error)
    if speaker == rank or (speaker is None and speaks_for_host()):
        who = f"rank {rank}" if speaker == rank else f"rank {rank} on {platform.node()}"
        explanation = f"[{who}] {(watch.explain(error) or text).rstrip()}"
        print(explanation, file=sys.stderr, flush=True)
        if watch.reports:
            print(watch.reports.gather(explanation), file=sys.stderr, flush=True)
        watch.say_explained()
        if speaker is None:  # while this process is there, nobody else speaks for its host
            time.sleep(LINGER_SECONDS)
        return
    if speaker is not None:
        print(f"[rank {rank}] stopped because rank {speaker} did", file=sys.stderr, flush=True)
    watch.wait_until_explained(LINGER_SECONDS + GRACE_SECONDS)
    time.sleep(LINGER_SECONDS)


def _explain_alone(rank: int, error: Exception, text: str) -> None:
    """Print what ends this rank, where it knows nothing of the others: what ends all of them, once.

    A wrong config is wrong everywhere, and rank 0 says so. What is wrong on a rank alone is told to rank 0, which waits
    for all, and says it. Where rank 0 does not answer, the first rank of a host says what is wrong there, and one rank
    of each what is wrong everywhere, or that rank 0 is missing. Of other errors, only a rank that is still there after
    the launcher would have ended it for rank 0's sake has its own.
    """
    if rank > 0:
        reason = text.removeprefix("error: ").rstrip()
        if not (is_shared(error) or isinstance(error, LostRanksError)) and report_at_roll(reason, exit_code_of(error)):
            return
        first_of_host = Rendezvous.from_environment().is_first_of_host
        if not (isinstance(error, HostError) and first_of_host):
            time.sleep(LINGER_SECONDS)
        of_rank = isinstance(error, DeviceError) or not isinstance(error, (UserError, LostRanksError))
        of_host = isinstance(error, HostError) and first_of_host
        speaks = not (is_shared(error) or of_rank or isinstance(error, HostError)) and speaks_for_host()
        if is_shared(error) or not (of_host or of_rank or speaks):
            return
        print(f"[rank {rank} on {platform.node()}] {text.rstrip()}", file=sys.stderr, flush=True)
        if speaks:  # while this process is there, nobody else speaks for its host
            time.sleep(LINGER_SECONDS)
        return
    print(text.rstrip(), file=sys.stderr, flush=True)
