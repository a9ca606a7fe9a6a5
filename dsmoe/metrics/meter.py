"""Collect a step's figures on the device, and reduce them over all ranks when they are logged.

Between log points nothing is read back to the host. At one, everything that is summed travels in one packed
all-reduce, and what is the worst of the ranks (waits, memory) in a second, short one.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from dsmoe.metrics.routing import layer_metrics, routing_metrics
from dsmoe.moe import LayerStatistics, MoE, read_statistics
from dsmoe.moe.step_updates import capacity_factor
from dsmoe.plan.plan import Plan

GIB = 2**30


class Meter:
    """The figures of one training run on this rank.

    Args:
        plan: sizes, FLOPs and the peak that figures are measured against.
        moe_layers: the model's MoE layers with the index of their block.
        device: where the sums live.
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
        """Clear the loss, which belongs to one step; the MoE layers' own `begin_step` does that for theirs."""
        self._loss_sum.zero_()

    def add_micro_batch(self, token_losses: torch.Tensor) -> None:
        """Add a micro-batch's cross entropies, [B, S] in nats."""
        self._loss_sum[0] += token_losses.detach().sum()
        self._loss_sum[1] += token_losses.numel()

    def is_loss_finite(self) -> torch.Tensor:
        """Whether this rank's loss of the step so far is a number: bool, on the device."""
        return torch.isfinite(self._loss_sum[0])

    def end_step(self, data_wait_seconds: float) -> None:
        """Count one optimizer step, `data_wait_seconds` of which went by waiting for data."""
        self._steps += 1
        self._data_wait_seconds += data_wait_seconds

    def restart_clock(self) -> None:
        """Leave out of the throughput whatever happened since the last log point (evaluation, saving)."""
        self._steps = 0
        self._data_wait_seconds = 0.0
        self._since = time.perf_counter()

    def add_stall(self, seconds: float) -> None:
        """Count time that training stood still for a checkpoint."""
        self._stall_seconds += seconds

    def read(self, layer_detail: bool) -> dict[str, float]:
        """Reduce over all ranks and return the metrics by name; collective. `layer_detail` adds every MoE layer's."""
        traffic = [layer.take_traffic() for _, layer in self._moe_layers]
        own = torch.tensor(
            [sum(intra for intra, _ in traffic), sum(inter for _, inter in traffic)],
            dtype=torch.float64,
            device=self._device,
        )
        sums = torch.cat([self._loss_sum, own, *(layer.statistics.sums for _, layer in self._moe_layers)])
        dist.all_reduce(sums)
        sums = sums.cpu()  # the device has finished the step: the clock may be read
        seconds = time.perf_counter() - self._since
        worst = torch.tensor(
            [seconds, self._data_wait_seconds, self._stall_seconds, self._peak_memory_gib()],
            dtype=torch.float64,
            device=self._device,
        )
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        metrics = {"train/loss": float(sums[0] / sums[1])}
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
        # By the convention of PaLM, attention in full, and by Megatron-LM's, half of it (dsmoe.plan.flops).
        tflops = {"": rate * flops.training / ranks / 1e12, "_causal": rate * flops.causal_training / ranks / 1e12}
        metrics = {
            "throughput/tokens_per_second": rate,
            "throughput/tokens_per_second_per_device": rate / ranks,
            "throughput/step_seconds": seconds / steps,
            "throughput/data_wait_seconds": wait / steps,
            **{f"throughput/tflops_per_device{kind}": value for kind, value in tflops.items()},
            "memory/peak_gib": memory,
        }
        facts = self._plan.device
        if facts is not None and facts.peak_tflops is not None:
            for kind, value in tflops.items():
                metrics[f"throughput/mfu_percent{kind}"] = value / facts.peak_tflops * 100
        if stall:
            metrics["checkpoint/stall_seconds"] = stall
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
            metrics["moe/capacity_factor"] = factor
        metrics["moe/all_to_all_gib/intra"] = float(traffic[0]) / ranks / GIB
        metrics["moe/all_to_all_gib/inter"] = float(traffic[1]) / ranks / GIB
        if layer_detail:
            for (index, _), layer in zip(self._moe_layers, layers, strict=True):
                metrics.update(layer_metrics(index, layer))
        return metrics

    def _peak_memory_gib(self) -> float:
        """The most memory torch's allocator held on the device, or the process' peak resident size on the CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / GIB
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
