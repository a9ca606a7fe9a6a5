"""The exchange of rows and its gradient, by hand."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist

from dsmoe.parallel import Groups
from dsmoe.parallel.collectives import Exchange, Traffic, all_to_all, start_all_to_all
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks


def exchange_uneven() -> dict[str, Any]:
    """Rank 0 keeps 1 row and sends 2; rank 1 sends 3 and keeps none. Row values are 10 * rank + index."""
    rank = dist.get_rank()
    group = Groups(Topology(1, 2, expert=2)).expert_group()
    send, receive = ([1, 2], [1, 3]) if rank == 0 else ([3, 0], [2, 0])
    rows = (10 * rank + torch.arange(3.0))[:, None].repeat(1, 2).requires_grad_()
    traffic = Traffic()
    received = all_to_all(rows, Exchange(group, traffic, send, receive))
    received.backward(100.0 * (rank + 1) + torch.arange(float(len(received)))[:, None].repeat(1, 2))
    return {"received": received[:, 0].tolist(), "gradient": rows.grad[:, 1].tolist(), "traffic": traffic.take()}


def test_uneven_exchange_and_its_gradient() -> None:
    first, second = run_ranks(2, exchange_uneven)
    assert first["received"] == [0, 10, 11, 12]
    assert second["received"] == [1, 2]
    # Gradients are 100 + place on rank 0 and 200 + place on rank 1, and go back to where the row came from.
    assert first["gradient"] == [100, 200, 201]
    assert second["gradient"] == [101, 102, 103]
    row_bytes = 2 * 4
    assert first["traffic"] == (row_bytes * (2 + 3), 0), "2 rows forward, 3 gradients back; what stays is no traffic"
    assert second["traffic"] == (row_bytes * (3 + 2), 0)


def exchange_equal() -> dict[str, Any]:
    rank = dist.get_rank()
    group = Groups(Topology(nodes=3, devices_per_node=1, expert=3)).expert_group()
    rows = (10.0 * rank + torch.arange(6.0))[:, None].to(torch.bfloat16).requires_grad_()
    traffic = Traffic()
    received = all_to_all(rows, Exchange(group, traffic))
    (received * (rank + 1)).sum().backward()
    return {
        "received": received.flatten().tolist(),
        "gradient": rows.grad.flatten().tolist(),
        "traffic": traffic.take(),
    }


def test_equal_exchange_and_its_gradient() -> None:
    for rank, result in enumerate(run_ranks(3, exchange_equal)):
        assert result["received"] == [10 * source + 2 * rank + i for source in range(3) for i in range(2)]
        assert result["gradient"] == [1, 1, 2, 2, 3, 3]
        assert result["traffic"] == (0, 2 * 2 * 2 * 2), "2 peers x 2 rows x 2 bytes, there and back, between nodes"


def exchange_two_at_once() -> dict[str, Any]:
    """The one that left last is waited for first; a second backward pass over the same graph."""
    rank = dist.get_rank()
    group = Groups(Topology(1, 2, expert=2)).expert_group()
    traffic = Traffic()
    first, second = (torch.full((2, 3), value + rank, requires_grad=True) for value in (10.0, 20.0))
    flights = [start_all_to_all(rows, Exchange(group, traffic)) for rows in (first, second)]
    received = [flight.wait() for flight in reversed(flights)]
    loss = sum((rows * (rank + 1) * scale).sum() for rows, scale in zip(received, (1, 10), strict=True))
    loss.backward(retain_graph=True)
    loss.backward()
    return {
        "received": [rows[:, 0].tolist() for rows in received],
        "gradients": [rows.grad[:, 0].tolist() for rows in (first, second)],
        "traffic": traffic.take(),
    }


def test_several_exchanges_can_be_under_way() -> None:
    for result in run_ranks(2, exchange_two_at_once):
        assert result["received"] == [[20, 21], [10, 11]]
        assert result["gradients"] == [[2 * 10, 2 * 20], [2 * 1, 2 * 2]]
        assert result["traffic"] == (2 * 3 * 3 * 4, 0), "of two exchanges, one row of 3 numbers there and twice back"


def graph_is_freed() -> bool:
    group = Groups(Topology(1, 2, expert=2)).expert_group()
    gc.disable()
    flight = start_all_to_all(torch.ones(2, 3, requires_grad=True), Exchange(group, Traffic()))
    received, exchange = flight.wait(), weakref.ref(flight.state.exchange)
    assert exchange() is not None
    del flight, received
    deadline = time.monotonic() + 10
    while exchange() is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # gloo's thread lets go of the rows a moment after they are here
    return exchange() is None


def test_a_graph_that_is_dropped_is_freed_without_the_garbage_collector() -> None:
    assert run_ranks(2, graph_is_freed) == [True, True]
