"""Live process groups are the topology's, and the ones that DeepSpeed finds under its own names."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from dsmoe.config.errors import UserError
from dsmoe.parallel import ExpertGroup, Groups
from dsmoe.plan import Topology
from dsmoe.runtime.processes import set_group_timeouts
from dsmoe.runtime.spawn import run_ranks

# By expert degree: the ranks of each rank's expert and expert-data group, for 4 ranks.
EXPERT = {
    1: [[0], [1], [2], [3]],
    2: [[0, 1], [0, 1], [2, 3], [2, 3]],
    4: [[0, 1, 2, 3]] * 4,
}
EXPERT_DATA = {
    1: [[0, 1, 2, 3]] * 4,
    2: [[0, 2], [1, 3], [0, 2], [1, 3]],
    4: [[0], [1], [2], [3]],
}


def describe_groups(topology: Topology) -> dict[str, Any]:
    groups = Groups(topology)
    name = groups.expert_group_name
    registry = {
        "expert": (deepspeed_groups._EXPERT_PARALLEL_GROUP, deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS),
        "expert_data": (
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        ),
    }
    result: dict[str, Any] = {"name": name, "coordinate": groups.coordinate("expert")}
    for axis, (handles, ranks) in registry.items():
        result[axis] = dist.get_process_group_ranks(groups.handle(axis))
        assert handles[name] is groups.handle(axis)
        assert list(ranks[name]) == result[axis]
        summed = torch.tensor([dist.get_rank()])
        dist.all_reduce(summed, group=groups.handle(axis))
        assert summed.item() == sum(result[axis]), "the group communicates"
    assert deepspeed_groups._get_data_parallel_group() is groups.handle("data")
    result["data"] = dist.get_process_group_ranks(deepspeed_groups._get_data_parallel_group())
    result["tensor"] = dist.get_process_group_ranks(groups.handle("tensor"))
    group = groups.expert_group()
    assert (group.handle, group.size, group.rank) == (groups.handle("expert"), topology.expert, result["coordinate"])
    result["same_node"] = group.same_node

    # What DeepSpeed itself makes of the same degree.
    for handles, ranks in registry.values():
        del handles[name], ranks[name]
    deepspeed_groups._create_expert_and_data_parallel(topology.expert)
    result["deepspeed"] = {axis: list(ranks[name]) for axis, (_, ranks) in registry.items()}
    return result


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("expert", [1, 2, 4])
def test_groups_are_the_topologys_and_deepspeeds(expert: int, nodes: int) -> None:
    results = run_ranks(4, describe_groups, Topology(nodes, 4 // nodes, expert=expert))
    for rank, result in enumerate(results):
        assert result["name"] == f"ep_size_{expert}"
        assert (result["expert"], result["expert_data"]) == (EXPERT[expert][rank], EXPERT_DATA[expert][rank])
        assert (result["data"], result["tensor"]) == ([0, 1, 2, 3], [rank])
        assert result["deepspeed"] == {"expert": EXPERT[expert][rank], "expert_data": EXPERT_DATA[expert][rank]}
        assert result["coordinate"] == EXPERT[expert][rank].index(rank)
        per_node = 4 // nodes
        assert result["same_node"] == tuple(r // per_node == rank // per_node for r in EXPERT[expert][rank])


def refuse(topology: Topology) -> str:
    with pytest.raises(UserError) as error:
        Groups(topology)
    return str(error.value)


def test_a_world_of_another_size_is_refused_with_both_numbers() -> None:
    for message in run_ranks(2, refuse, Topology(2, 4)):
        assert "2 x 4 = 8 ranks, but the launcher started 2" in message


def describe_folded() -> dict[str, Any]:
    groups = Groups(Topology(2, 4, tensor=4, expert=2, expert_tensor=2))
    deepspeed_groups.mpu = groups.mpu  # the engine does so
    name = groups.expert_group_name
    sequence, whole = groups.tensor_group(sequence=True), groups.tensor_group()
    assert (sequence.handle, sequence.size, sequence.rank) == (groups.handle("tensor"), 4, dist.get_rank() % 4)
    assert sequence.over_sequence is sequence
    assert (whole.sequence, whole.over_sequence.size) == (False, 1)
    assert groups.expert_group().size == 4
    assert deepspeed_groups._get_model_parallel_world_size() == 4
    assert deepspeed_groups._get_data_parallel_world_size() == 2
    return {
        "data": dist.get_process_group_ranks(deepspeed_groups._get_data_parallel_group()),
        "experts": dist.get_process_group_ranks(deepspeed_groups._get_expert_parallel_group(name)),
        "expert_data": dist.get_process_group_ranks(deepspeed_groups._get_expert_data_parallel_group(name)),
        "tensor": dist.get_process_group_ranks(groups.mpu.get_model_parallel_group()),
        "sources": (deepspeed_groups._get_broadcast_src_rank(), deepspeed_groups._get_expert_broadcast_src_rank(name)),
    }


def test_tensor_ranks_and_folded_experts_as_deepspeed_sees_them() -> None:
    for rank, found in enumerate(run_ranks(8, describe_folded)):
        first = rank // 4 * 4
        assert found == {
            "data": [rank % 4, rank % 4 + 4],
            "experts": list(range(first, first + 4)),
            "expert_data": [rank % 4, rank % 4 + 4],
            "tensor": list(range(first, first + 4)),
            "sources": (rank % 4, rank % 4),
        }


def registered_nodes() -> tuple[bool, ...]:
    Groups(Topology(1, 4, expert=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        return ExpertGroup.registered("ep_size_4").same_node


def test_a_registered_group_knows_its_nodes_from_the_launcher() -> None:
    first, second = (True, True, False, False), (False, False, True, True)
    assert run_ranks(4, registered_nodes) == [first, first, second, second]


def timeouts() -> tuple[dict[str, float], dict[str, float]]:
    """Seconds, of every group, before and after."""
    groups = Groups(Topology(1, 2, expert=2), timeout=timedelta(seconds=40))
    deepspeed_groups._create_expert_and_data_parallel(1)  # one group with DeepSpeed's default
    everything = {
        "world": dist.group.WORLD,
        **{axis: groups.handle(axis) for axis in ("expert", "expert_data", "data", "tensor", "expert_tensor")},
        "deepspeed": deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP["ep_size_1"],
    }

    def read() -> dict[str, float]:
        cpu = torch.device("cpu")
        return {name: g._get_backend(cpu).options._timeout.total_seconds() for name, g in everything.items()}

    before = read()
    set_group_timeouts(timedelta(seconds=77))
    return before, read()


def test_timeout_reaches_every_group() -> None:
    for before, after in run_ranks(2, timeouts):
        assert {before[axis] for axis in ("expert", "expert_data", "data")} == {40.0}
        assert 77.0 not in before.values()
        assert set(after.values()) == {77.0}


def wait_in_vain() -> float:
    """Seconds until rank 0 gives up on a rank 1 that never comes."""
    groups = Groups(Topology(1, 2, expert=2))
    set_group_timeouts(timedelta(seconds=1))
    begun = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"(?i)time"):
            dist.all_reduce(torch.ones(1), group=groups.handle("expert"))
    set_group_timeouts(timedelta(seconds=60))
    return time.monotonic() - begun


def test_timeout_ends_the_wait_for_a_missing_rank() -> None:
    assert run_ranks(2, wait_in_vain)[0] > 0.9
