"""The meter of a run: sums on the device during a step, reduced over all ranks on log steps.

Between log steps nothing is read back to the host. A log step takes two collectives: one packed all-reduce of all sums,
and a short one of the maxima over ranks (seconds, memory).
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from dsmoe.metrics import definitions as metric
from dsmoe.metrics.routing import layer_metrics, routing_metrics
from dsmoe.moe import LayerStatistics, MoE, read_statistics
from dsmoe.moe.step_updates import capacity_factor
from dsmoe.plan.plan import Plan

GIB = 2**30


class Meter:
    """Measure one training run on this rank, and reduce over all ranks.

    Args:
        plan: sizes, FLOPs and the peak that figures are measured against.
        moe_layers: the model's MoE layers with the index of their block.
        device: the device of the sums.
    """

    def __init__(self, plan: Plan, moe_layers: list[tuple[int, MoE]], device: torch.device) -> None:
        self._plan = plan
        self._moe_layers = moe_layers
        self._device = device
        self._loss_sum = torch.zeros(2, dtype=torch.float64, device=device)
        self._steps = 0
        self._data_wait_seconds = 0.0
        self._stall_seconds = 0.0
        self._since = time.perf_counter()

    def begin_step(self) -> None:
        """Clear the sums of the loss; `MoE.begin_step` clears the layers' statistics."""
        self._loss_sum.zero_()

    def add_micro_batch(self, token_losses: torch.Tensor) -> None:
        """Add the cross entropies of a micro-batch, [B, S] in nats."""
        self._loss_sum[0] += token_losses.detach().sum()
        self._loss_sum[1] += token_losses.numel()

    def is_loss_finite(self) -> torch.Tensor:
        """Return whether this rank's loss of the step so far is finite: bool, on the device."""
        return torch.isfinite(self._loss_sum[0])

    def end_step(self, data_wait_seconds: float) -> None:
        """Count one optimizer step, which waited `data_wait_seconds` for data."""
        self._steps += 1
        self._data_wait_seconds += data_wait_seconds

    def restart_clock(self) -> None:
        """Begin a new interval of the throughput: evaluations and checkpoints since the last log step are left out."""
        self._steps = 0
        self._data_wait_seconds = 0.0
        self._since = time.perf_counter()

    def add_stall(self, seconds: float) -> None:
        """Add time that training stood still for a checkpoint."""
        self._stall_seconds += seconds

    def read(self, layer_detail: bool) -> dict[str, float]:
        """Reduce over all ranks and return the metrics by name; collective.

        Args:
            layer_detail: add the metrics of every MoE layer.
        """
        traffic = [layer.take_traffic() for _, layer in self._moe_layers]
        sent_bytes = torch.tensor(
            [sum(intra for intra, _ in traffic), sum(inter for _, inter in traffic)],
            dtype=torch.float64,
            device=self._device,
        )
        sums = torch.cat([self._loss_sum, sent_bytes, *(layer.statistics.sums for _, layer in self._moe_layers)])
        dist.all_reduce(sums)
        sums = sums.cpu()  # the device has finished the step: the clock may be read
        seconds = time.perf_counter() - self._since
        worst = torch.tensor(
            [seconds, self._data_wait_seconds, self._stall_seconds, self._peak_memory_gib()],
            dtype=torch.float64,
            device=self._device,
        )
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        metrics = {metric.TRAIN_LOSS.name: float(sums[0] / sums[1])}
        metrics.update(self._throughput(*worst.tolist()))
        if self._moe_layers:
            metrics.update(self._routing(sums[2:], layer_detail))
        self.restart_clock()
        self._stall_seconds = 0.0
        return metrics

    def _throughput(self, seconds: float, wait: float, stall: float, memory: float) -> dict[str, float]:
        batch, steps = self._plan.batch, max(self._steps, 1)
        rate = batch.tokens_per_step * steps / seconds
        ranks = batch.topology.world_size
        flops = self._plan.flops
        # Two conventions (dsmoe.plan.flops): PaLM counts attention in full, Megatron-LM half of it.
        tflops = rate * flops.training / ranks / 1e12
        causal_tflops = rate * flops.causal_training / ranks / 1e12
        metrics = {
            metric.THROUGHPUT_TOKENS_PER_SECOND.name: rate,
            metric.THROUGHPUT_TOKENS_PER_SECOND_PER_DEVICE.name: rate / ranks,
            metric.THROUGHPUT_STEP_SECONDS.name: seconds / steps,
            metric.THROUGHPUT_DATA_WAIT_SECONDS.name: wait / steps,
            metric.THROUGHPUT_TFLOPS_PER_DEVICE.name: tflops,
            metric.THROUGHPUT_TFLOPS_PER_DEVICE_CAUSAL.name: causal_tflops,
            metric.MEMORY_PEAK_GIB.name: memory,
        }
        facts = self._plan.device
        if facts is not None and facts.peak_tflops is not None:
            metrics[metric.THROUGHPUT_MFU_PERCENT.name] = tflops / facts.peak_tflops * 100
            metrics[metric.THROUGHPUT_MFU_PERCENT_CAUSAL.name] = causal_tflops / facts.peak_tflops * 100
        if stall:
            metrics[metric.CHECKPOINT_STALL_SECONDS.name] = stall
        return metrics

    def _routing(self, sums: torch.Tensor, layer_detail: bool) -> dict[str, float]:
        ranks = self._plan.batch.topology.world_size
        traffic, *sums_of_layers = sums.split([2, *(layer.statistics.sums.numel() for _, layer in self._moe_layers)])
        layers: list[LayerStatistics] = [
            read_statistics(part, layer.num_experts)
            for part, (_, layer) in zip(sums_of_layers, self._moe_layers, strict=True)
        ]
        metrics = routing_metrics(layers)
        factor = capacity_factor([layer for _, layer in self._moe_layers])
        if factor is not None:
            metrics[metric.MOE_CAPACITY_FACTOR.name] = factor
        metrics[metric.MOE_ALL_TO_ALL_GIB_INTRA.name] = float(traffic[0]) / ranks / GIB
        metrics[metric.MOE_ALL_TO_ALL_GIB_INTER.name] = float(traffic[1]) / ranks / GIB
        if layer_detail:
            for (index, _), layer in zip(self._moe_layers, layers, strict=True):
                metrics.update(layer_metrics(index, layer))
        return metrics

    def _peak_memory_gib(self) -> float:
        """Return the most memory that torch's allocator reserved on the device; on a CPU, the peak resident size."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / GIB
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
