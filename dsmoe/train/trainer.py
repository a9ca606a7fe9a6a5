"""The training loop: one step that reads top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from dsmoe.checkpoint.checkpointer import Checkpointer
from dsmoe.checkpoint.folder import all_checkpoints, inspect, step_of
from dsmoe.checkpoint.placement import sharded_tensors
from dsmoe.checkpoint.retention import set_aside
from dsmoe.config.errors import ExplainedError
from dsmoe.data import PreparedSource
from dsmoe.engine.deepspeed_config import accepted_by_deepspeed
from dsmoe.engine.make_engine import make_engine
from dsmoe.engine.update_guard import UpdateGuard, propagate_non_finite
from dsmoe.metrics import definitions as metric
from dsmoe.metrics.console import console_line
from dsmoe.metrics.meter import Meter
from dsmoe.metrics.sinks import Sink
from dsmoe.model import Transformer, build_model
from dsmoe.moe import begin_step, hold_drop_rate, update_routers
from dsmoe.parallel.groups import Groups
from dsmoe.plan.plan import Plan
from dsmoe.plan.text import quantity
from dsmoe.runtime.processes import Rank, run_on_rank_0
from dsmoe.train.changed import changed_held_out, changed_order, changed_rate
from dsmoe.train.evaluate import evaluate
from dsmoe.train.phases import Phase, phase
from dsmoe.train.run_data import RunData, load_data
from dsmoe.train.signals import StopSignals
from dsmoe.train.summary import after_divergence

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


MAX_SKIPPED_IN_A_ROW = 20
"""DeepSpeed skips a step whose gradients are not finite; a run that only skips is over."""


class TrainingDivergedError(ExplainedError):
    """The loss or the state is no longer finite, or no step is taken any more."""


class Trainer:
    """One run on this rank: the step, and what comes between steps.

    Making it is collective, and so are all its methods.

    Args:
        plan: the run.
        rank: who this process is.
        engine: as `make_engine` returns it; wraps the model.
        data: what the run reads.
        checkpoints: where it is saved.
        meter: collects the metrics of its steps.
    """

    def __init__(
        self, plan: Plan, rank: Rank, engine: DeepSpeedEngine, data: RunData, checkpoints: Checkpointer, meter: Meter
    ) -> None:
        self.plan, self.rank, self.engine = plan, rank, engine
        self.data, self.checkpoints, self.meter = data, checkpoints, meter
        self.model: Transformer = engine.module
        self.guard: UpdateGuard = engine.update_guard
        self.moe_layers = [layer for _, layer in self.model.moe_layers()]
        self.signals = StopSignals(plan.collective_timeout)
        self.sinks: Sequence[Sink] = ()
        """Outputs of rank 0's metrics."""
        self.step_index = 0
        """Optimizer steps done."""
        self.used_learning_rate = 0.0
        """Learning rate of the last step."""
        self._skipped_in_a_row = 0
        """Skipped steps in a row up to the last counted step."""
        self._is_counted = True
        """True once `_count_skips` has counted the last step."""
        self._odd_steps = torch.zeros((), dtype=torch.int64, device=rank.device)
        """This rank's steps with a loss or gradient norm that is not finite, since the last log point."""
        self._looked_at = self._begun_at = 0
        self._begun_with: Path | None = None
        self._skipped_before = 0
        """Steps that were skipped before this start."""
        self._validation_loss = math.nan
        self._validated_step = -1

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, whatever layout wrote it; says what is different from the run that was saved.

        Raises:
            UserError: it would read other text than that run, and `data.changed_order` does not accept it.
        """
        self._count_skips()  # of the state that is left
        for change in run_on_rank_0(lambda: self._changes(checkpoint)):
            logger.warning("%s", change)
        facts, self._begun_with = self.checkpoints.load(checkpoint), checkpoint
        self.step_index = self._looked_at = self._begun_at = facts.step
        self._skipped_before = facts.skipped_steps

    def _changes(self, checkpoint: Path) -> list[str]:
        facts, plan, data = inspect(checkpoint).facts, self.plan, self.data
        changes = (
            changed_order(checkpoint, facts, plan, data.order),
            changed_rate(checkpoint, facts, plan),
            changed_held_out(checkpoint, facts, plan.config, data.order, data.held_out_digest),
        )
        return [change for change in changes if change]

    def take_weights(self, checkpoint: Path) -> None:
        """Begin with the weights of a checkpoint, whatever layout wrote it; everything else is new."""
        self.checkpoints.load_weights(checkpoint)

    def run(self) -> bool:
        """Train to the last step, with evaluations and checkpoints on the way; False if a signal has ended it before.

        When it returns, the state is on the disk.
        """
        config, num_steps = self.plan.config, self.plan.batch.steps
        train, save_every = config.train, config.checkpoint.every
        self.signals.listen()
        self.checkpoints.reserve()
        self.meter.restart_clock()
        stop = is_due = False
        while self.step_index < num_steps and not stop:
            grad_norm = self.step()
            with phase(Phase.AGREEMENT):
                stop, last = self.signals.agreed(), self.step_index == num_steps
            if last or stop or self.step_index % config.observe.log_every == 0:
                self.log(grad_norm)
            # The sender of a signal waits half a minute or so: that is for saving.
            if last or (not stop and train.eval_every and self.step_index % train.eval_every == 0):
                self.evaluate()
            is_due_now = bool(save_every and self.step_index % save_every == 0)
            is_due = is_due or is_due_now
            # While gradients are not finite nothing is learnt, and soon nothing good would be left to go back to.
            if last or stop or (is_due and self._count_skips() == 0):
                self.save()
                is_due = False
            elif is_due_now:
                self.checkpoints.put_off(self.step_index)
        self.signals.finish()
        with phase(Phase.SAVE):
            self.checkpoints.finish(self.signals.told, is_stopping=stop)
        return self.step_index == num_steps

    def step(self) -> torch.Tensor | float:
        """One optimizer step; returns the gradient norm before clipping, on the device where it is there.

        If that or a loss is not finite, on any rank, the state stays as it was; see `dsmoe.engine.update_guard`.
        """
        self.meter.begin_step()
        begin_step(self.moe_layers, self.step_index)
        micro_batches, data_wait = self.data.loader.micro_batches(self.step_index), 0.0
        for number in range(self.plan.batch.accumulation_steps):
            with phase(Phase.DATA, self.step_index + 1):
                begun = time.perf_counter()
                tokens = next(micro_batches)
                data_wait += time.perf_counter() - begun
            with phase(Phase.FORWARD):
                losses_BS = self.engine(self._on_device(tokens))
            with phase(Phase.BACKWARD):
                self.engine.backward(propagate_non_finite(losses_BS.mean()))
            with phase(Phase.OPTIMIZER):
                if number == 0:
                    self._count_skips()  # of the step before, which has ended while this pass is under way
                self.used_learning_rate = self.engine.get_lr()[0]
                self.engine.step()
            self.meter.add_micro_batch(losses_BS)
        update_routers(self.moe_layers, self.guard.was_applied())
        self._is_counted = False
        self.meter.end_step(data_wait)
        self.step_index += 1
        grad_norm = self.engine.get_global_grad_norm()
        self._odd_steps += ~(self.meter.is_loss_finite() & _is_finite(grad_norm))
        return grad_norm

    def _count_skips(self) -> int:
        """The steps up to the last that were skipped in a row; waits for the device where only that knows."""
        if not self._is_counted:
            self.guard.settle()
            self._skipped_in_a_row = 0 if self.engine.was_step_applied() else self._skipped_in_a_row + 1
            self._is_counted = True
        return self._skipped_in_a_row

    def log(self, grad_norm: torch.Tensor | float) -> None:
        """Reduce the step's figures over all ranks and write them down."""
        detail_every = self.plan.config.observe.layer_detail_every
        with phase(Phase.METRICS):
            metrics = self.meter.read(layer_detail=bool(detail_every) and self.step_index % (detail_every or 1) == 0)
        self._count_skips()
        if self.moe_layers:
            hold_drop_rate(self.moe_layers, metrics[metric.MOE_DROPPED_PERCENT.name])
        metrics[metric.OPTIM_GRAD_NORM.name] = float(grad_norm)
        metrics[metric.OPTIM_LR.name] = self.used_learning_rate
        metrics[metric.OPTIM_SKIPPED_STEPS.name] = float(self.engine.skipped_steps)
        metrics[metric.PROGRESS_TOKENS.name] = float(self.step_index * self.plan.batch.tokens_per_step)
        metrics[metric.PROGRESS_PERCENT.name] = 100.0 * self.step_index / self.plan.batch.steps
        self._write(metrics)
        memory_gib = self.plan.device.memory_gib if self.plan.device else None
        logger.info(console_line(metrics, self.step_index, self.plan.batch.steps, memory_gib))
        only_skips = self._only_skips()
        if not math.isfinite(metrics[metric.TRAIN_LOSS.name]) or only_skips:
            with phase(Phase.SAVE):
                self.checkpoints.wait()
            if only_skips:
                self._set_dead_end_aside()
            skipped = self.skipped_steps() or "no step was skipped"
            self._end_diverged(
                f"the loss is {metrics[metric.TRAIN_LOSS.name]:.4g}, "
                f"the gradient norm {metrics[metric.OPTIM_GRAD_NORM.name]:.4g}, and {skipped}"
            )
        self._odd_steps.zero_()
        self._looked_at = self.step_index

    def _only_skips(self) -> bool:
        """Return whether training only skips: for long, or at the end for more than half of this start's steps."""
        at_end = self.step_index == self.plan.batch.steps
        skipped = self._count_skips()
        most = 2 * skipped > self.step_index - self._begun_at
        return skipped >= MAX_SKIPPED_IN_A_ROW or (at_end and most)

    def skipped_steps(self) -> str:
        """Say how many steps of this start were skipped, and how many at its end; empty where none was."""
        in_a_row = self._count_skips()
        skipped = self.engine.skipped_steps - self._skipped_before
        if not skipped:
            return ""
        total = quantity(self.step_index - self._begun_at, "step")
        last = f", the last {in_a_row} in a row" if in_a_row else ""
        return f"{skipped} of {total} were skipped{last}, because gradients were not finite"

    def evaluate(self) -> dict[str, float]:
        """Held-out losses of every source, written down."""
        with phase(Phase.EVALUATION):
            what = f"the evaluation after step {self.step_index}"
            metrics = evaluate(self.model, self.data.held_out, self.rank.device, what)
        self._validation_loss, self._validated_step = metrics[metric.EVAL_LOSS.name], self.step_index
        self._write({**metrics, metric.EVAL_HELD_OUT.name: self.data.held_out_text})
        bits = {each.name: metric.EVAL_SOURCE_BITS_PER_BYTE.name_for(each.name) for each in self.data.sources}
        by_source = "  ".join(f"{source} {metrics[name]:.3f}" for source, name in bits.items())
        logger.info(
            "eval %d loss %.4f bits/byte %.3f (%s)",
            self.step_index,
            metrics[metric.EVAL_LOSS.name],
            metrics[metric.EVAL_BITS_PER_BYTE.name],
            by_source,
        )
        self.meter.restart_clock()
        return metrics

    def save(self) -> Path:
        """Save a checkpoint of this step, or begin to; `checkpoints.flush` waits for its end.

        While steps are skipped it removes no earlier one: this one may be of a state from which none is taken any more.

        Raises:
            TrainingDivergedError: the loss of this step or the state is not finite: it would take the place of a good
                checkpoint, and nothing can go on from it.
        """
        with phase(Phase.SAVE):
            begun = time.perf_counter()
            if not self.checkpoints.is_finite(self.meter.is_loss_finite()):
                since = self.step_index - self._looked_at
                self._end_diverged(
                    f"the loss, a weight or the optimizer's state is not finite (of the last {since} steps, "
                    f"{self._odd_steps} had such a loss or gradient norm), and it is not saved"
                )
            is_known = self._validated_step == self.step_index and math.isfinite(self._validation_loss)
            loss = self._validation_loss if is_known else None
            tokens, tidies = self.step_index * self.plan.batch.tokens_per_step, self._count_skips() == 0
            path = self.checkpoints.save(self.step_index, tokens, loss, tidies=tidies)
            self.meter.restart_clock()
            self.meter.add_stall(time.perf_counter() - begun)
            return path

    def _set_dead_end_aside(self) -> None:
        """Rename what this start has saved of the state after which every step was skipped: it is finite and bad."""
        last_taken = self.step_index - self._skipped_in_a_row

        def rename() -> list[Path]:
            saved = all_checkpoints(self.checkpoints.folder)
            return set_aside(path for path in saved if step_of(path) >= max(last_taken, self._begun_at + 1))

        for path in run_on_rank_0(rename):
            logger.warning("set aside, because every step after it was skipped: %s", path)

    def _end_diverged(self, what: str) -> NoReturn:
        """Raise the error that says what was seen, and which command goes on from the last good checkpoint."""
        self.checkpoints.wait()  # every rank is here: the one before is to be there
        raise TrainingDivergedError(
            f"at step {self.step_index} {what}. "
            f"{after_divergence(self.plan.config, self.checkpoints.folder, self._begun_with)}"
        )

    def _on_device(self, tokens: torch.Tensor) -> torch.Tensor:
        """Copy to the device without stopping the host: only pinned memory allows that."""
        if self.rank.device.type == "cpu":
            return tokens
        return tokens.pin_memory().to(self.rank.device, non_blocking=True)

    def _write(self, metrics: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            try:
                sink.write(self.step_index, metrics)
            except Exception as error:  # no report is a reason to stop: the state is in memory
                reason = getattr(error, "strerror", None) or repr(error)
                logger.error("cannot write metrics of step %d: %s", self.step_index, reason)


def make_trainer(
    plan: Plan,
    groups: Groups,
    rank: Rank,
    checkpoint_folder: Path,
    sources: Sequence[PreparedSource],
    settings: dict[str, Any] | None = None,
) -> Trainer:
    """Put a run's parts together; collective.

    Args:
        plan: the run.
        groups: this rank's process groups.
        rank: who this process is.
        checkpoint_folder: where checkpoints are saved.
        sources: the data, as `prepare_data` returns them.
        settings: the configuration for DeepSpeed; None asks `accepted_by_deepspeed`.
    """
    model = build_model(plan.config, groups, rank.device)
    engine = make_engine(model, plan, groups, settings or accepted_by_deepspeed(plan))
    data = load_data(plan, groups, sources)
    checkpoints = Checkpointer(checkpoint_folder, engine, sharded_tensors(model), plan.config, data.facts())
    return Trainer(plan, rank, engine, data, checkpoints, Meter(plan, model.moe_layers(), rank.device))


def _is_finite(number: torch.Tensor | float) -> torch.Tensor | bool:
    """Return whether a number is finite, without a copy to the host."""
    return torch.isfinite(number) if isinstance(number, torch.Tensor) else math.isfinite(number)
