"""What every token passes is computed while rows are on their way to the experts, and so are its gradients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dsmoe
from dsmoe.parallel import ExpertGroup, Groups, collectives
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer

D = 16


def make_layer(dense: str, factor: float | None, **options: Any) -> dsmoe.MoE:
    more: dict[str, Any] = {"use_residual": True} if dense == "residual" else {"shared_expert_ffn_size": 24}
    sizes = {"num_experts": 4, "ep_size": 2, "expert_ffn_size": 8, "max_tokens": 12}
    return moe_layer(D, k=2, capacity_factor=factor, seed=0, **sizes, **more, **options)


class Network:
    """In place of `deepspeed.comm`: a peer that sends the same rows, which arrive only when they are waited for."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def all_to_all_single(
        self, received: torch.Tensor, sent: torch.Tensor, *_: Any, async_op: bool = False, **__: Any
    ) -> Any:
        if not async_op:
            return received.copy_(sent)
        kind = "rows" if sent.shape[1] == D else "weights"
        self.events.append(f"start {kind}")
        received.fill_(torch.nan if received.is_floating_point() else -1)
        return Work(lambda: (self.events.append(f"wait {kind}"), received.copy_(sent)))


class Work:
    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


@pytest.mark.parametrize("dense", ["shared", "residual"])
@pytest.mark.parametrize("factor", [None, 1.0], ids=["variable", "padded"])
def test_the_order_of_events(dense: str, factor: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    monkeypatch.setattr(collectives, "comm", network)
    layer = make_layer(dense, factor)
    layer.set_expert_group(ExpertGroup(None, 2, 0, (True, True)))
    module = layer.mlp if dense == "residual" else layer.shared
    module.register_forward_hook(lambda *_: network.events.append("dense"))
    module.register_full_backward_hook(lambda *_: network.events.append("dense"))
    layer.experts.register_forward_hook(lambda *_: network.events.append("experts"))
    layer.experts.gate_up.register_hook(lambda _: network.events.append("experts"))

    x = torch.randn(12, D, requires_grad=True)
    output, _, _ = layer(x)
    there, home = ["start rows", "start weights", "dense", "wait rows", "wait weights"], ["start rows", "wait rows"]
    assert network.events == [*there, "experts", *home]
    network.events.clear()
    output.sum().backward()
    assert [event for event in network.events if event != "experts"] == [
        *home,
        *("start weights", "start rows", "dense", "wait weights", "wait rows"),
    ]
    assert network.events.index("experts") < network.events.index("dense")
    assert output.isfinite().all(), "nothing was read before it was there"
    assert all(tensor.grad.isfinite().all() for tensor in (x, *layer.parameters()))


def late_rank(folder: Path, factor: float | None) -> None:
    """Rank 1 sends nothing before rank 0 has done its dense work: a rank 0 that waited for rank 1 first would hang."""
    layer = make_layer("shared", factor)
    layer.set_expert_group(Groups(Topology(1, 2, expert=2)).expert_group())
    x = torch.randn(12, D, requires_grad=True)
    forward, backward = folder / "forward", folder / "backward"
    if dist.get_rank() == 0:
        layer.shared.register_forward_hook(lambda *_: forward.touch())
        layer.shared.register_full_backward_hook(lambda *_: backward.touch())
    else:
        start, before = collectives.Exchange.start, iter([forward, None, None, None, backward, None])

        def start_late(exchange: collectives.Exchange, rows_ND: torch.Tensor) -> collectives.Transfer:
            wait_for(next(before))
            return start(exchange, rows_ND)

        collectives.Exchange.start = start_late
    layer(x)[0].sum().backward()


def wait_for(file: Path | None) -> None:
    deadline = time.monotonic() + 30
    while file is not None and not file.exists():
        assert time.monotonic() < deadline, f"rank 0 never came to its {file.name} pass"
        time.sleep(0.01)


@pytest.mark.parametrize("factor", [None, 1.0], ids=["variable", "padded"])
def test_dense_work_needs_no_other_rank(factor: float | None, tmp_path: Path) -> None:
    run_ranks(2, late_rank, tmp_path, factor)
    assert {path.name for path in tmp_path.iterdir()} == {"forward", "backward"}


NEAR, FAR = ExpertGroup(None, 2, 0, (True, True)), ExpertGroup(None, 2, 0, (True, False))
ALONE = ExpertGroup(None, 1, 0, (True,))


@pytest.mark.parametrize(
    ("factor", "group"),
    [(None, NEAR), (1.0, NEAR), (None, replace(FAR, levels=(FAR, ALONE)))],
    ids=["variable", "padded", "hierarchical"],
)
def test_the_order_of_events_with_two_chunks(
    factor: float | None, group: ExpertGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network()
    monkeypatch.setattr(collectives, "comm", network)
    layer = make_layer("shared", factor, overlap_chunks=2)
    layer.set_expert_group(group)
    layer.shared.register_forward_hook(lambda *_: network.events.append("dense"))
    layer.shared.register_full_backward_hook(lambda *_: network.events.append("dense"))

    def record(_: Any, __: Any, output: torch.Tensor) -> None:
        network.events.append("experts")
        output.register_hook(lambda _: network.events.append("experts"))

    layer.experts.register_forward_hook(record)
    x = torch.randn(12, D, requires_grad=True)
    output, _, _ = layer(x)
    # Inside a node rows are handed on and waited for at once.
    inside = ["start rows", "wait rows"] if group.levels else []
    events = [event for event in network.events if "weights" not in event]
    out, back = ["wait rows", *inside, "experts", *inside, "start rows"], ["wait rows"] * 2
    assert events == [*["start rows"] * 2, "dense", *out, *out, *back]
    network.events.clear()
    output.sum().backward()
    events = [event for event in network.events if "weights" not in event]
    assert events == [*["start rows"] * 2, *out, *out, "dense", *back]
    assert output.isfinite().all(), "nothing was read before it was there"
    assert all(tensor.grad.isfinite().all() for tensor in (x, *layer.parameters()))


def late_chunk(folder: Path, factor: float | None) -> None:
    """Rank 1 sends no second chunk before the experts of rank 0 have done the first, nor its gradients."""
    layer = make_layer("shared", factor, overlap_chunks=2)
    layer.set_expert_group(Groups(Topology(1, 2, expert=2)).expert_group())
    forward, backward = folder / "forward", folder / "backward"
    if dist.get_rank() == 0:

        def record(_: Any, __: Any, output: torch.Tensor) -> None:
            forward.touch()
            output.register_hook(lambda _: backward.touch())

        layer.experts.register_forward_hook(record)
    else:
        start = collectives.Exchange.start
        # Out rows and weights of two chunks, home two; gradients of these two, then of what went out.
        before = iter([None, None, forward, None, None, None, None, backward, *[None] * 4])

        def start_late(exchange: collectives.Exchange, rows_ND: torch.Tensor) -> collectives.Transfer:
            wait_for(next(before))
            return start(exchange, rows_ND)

        collectives.Exchange.start = start_late
    layer(torch.randn(12, D, requires_grad=True))[0].sum().backward()


@pytest.mark.parametrize("factor", [None, 1.0], ids=["variable", "padded"])
def test_experts_work_on_a_chunk_while_the_next_is_on_its_way(factor: float | None, tmp_path: Path) -> None:
    run_ranks(2, late_chunk, tmp_path, factor)
    assert {path.name for path in tmp_path.iterdir()} == {"forward", "backward"}


def compare_chunks(nodes: int, factor: float | None) -> None:
    """One, three and five chunks of 12 and 9 tokens, or of 4 places: the same outputs and gradients."""
    topology = Topology(nodes, 2 // nodes, expert=2, all_to_all="hierarchical")
    groups, results = Groups(topology), []
    for chunks in (1, 3, 5):
        torch.manual_seed(0)
        layer = make_layer("shared", factor, overlap_chunks=chunks)
        layer.set_expert_group(groups.expert_group())
        torch.manual_seed(dist.get_rank())
        x = torch.randn(12 - 3 * dist.get_rank(), D, requires_grad=True)
        output, _, counts = layer(x)
        output.square().sum().backward()
        results.append((output, counts, x.grad, *(p.grad for p in layer.parameters()), layer.statistics.sums))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("factor", [None, 0.5], ids=["dropless", "dropping"])
def test_the_number_of_chunks_changes_nothing(nodes: int, factor: float | None) -> None:
    run_ranks(2, compare_chunks, nodes, factor)
