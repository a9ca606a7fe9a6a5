"""The ranks that launchers have started, by their variables, and the variables that are set for this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dsmoe.config import Config, load_config
from dsmoe.config.errors import UserError
from dsmoe.runtime.world import World, launched_world, launcher_has_store, set_rank_variables
from tests.helpers.side_by_side import run_side_by_side

DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_SIZE": "2", "CROSS_RANK": "1"}
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "x",
}

TINY = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"

ALLOCATION = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
"""In the shell that salloc starts (Slurm 22.05)."""
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
"""In a job's script."""


def step(rank: int, nodes: int = 2, per_node: int = 2) -> dict[str, str]:
    """In a task of `srun` in that job."""
    node = rank // per_node
    return {
        **BATCH,
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NODELIST": "gpu[08-09]",
        "SLURM_STEP_NUM_TASKS": str(nodes * per_node),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})" if nodes > 1 else str(per_node),
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_GTIDS": ",".join(str(node * per_node + task) for task in range(per_node)),
    }


def joined(environment: dict[str, str]) -> dict[str, str]:
    """The variables that `set_rank_variables` adds or changes."""
    after = dict(environment)
    set_rank_variables(after)
    return {name: value for name, value in after.items() if environment.get(name) != value}


def test_every_task_of_srun_is_a_rank() -> None:
    common = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu08", "MASTER_PORT": "13456"}
    for rank in range(4):
        assert joined(step(rank)) == {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), **common}
        environment = step(rank)
        set_rank_variables(environment)
        set_rank_variables(environment)  # which is the same as once
        assert launched_world(environment) == World(4, 2, "srun")


def test_one_task_per_node_and_all_tasks_on_one() -> None:
    assert joined(step(1, nodes=2, per_node=1))["LOCAL_WORLD_SIZE"] == "1"
    alone = step(3, nodes=1, per_node=4)
    set_rank_variables(alone)
    assert launched_world(alone) == World(4, 4, "srun")


def test_an_address_and_a_port_that_are_set_stay() -> None:
    given = {**step(1), "MASTER_ADDR": "10.0.0.8", "MASTER_PORT": "29500"}
    assert not {"MASTER_ADDR", "MASTER_PORT"} & joined(given).keys()


def test_another_attempt_of_a_job_has_another_port() -> None:
    ports = [int(joined({**step(1), "SLURM_RESTART_COUNT": str(restart)})["MASTER_PORT"]) for restart in range(3)]
    assert len({*ports, int(joined(step(1))["MASTER_PORT"])}) == 3
    assert all(10_000 <= port < 30_000 for port in ports)


@pytest.mark.parametrize(
    ("where", "environment"),
    [
        ("no Slurm", {}),
        ("the shell of salloc", ALLOCATION),
        ("a job's script", BATCH),
        ("a job's script that a task of another job has submitted", {**step(3), **BATCH}),
        ("a step of one task, as a shell is", step(0, nodes=1, per_node=1)),
        ("torchrun in a task", {**step(1, per_node=1), **TORCHRUN}),
        ("deepspeed in a task", {**step(1, per_node=1), **DEEPSPEED}),
    ],
)
def test_nothing_else_in_a_job_is_taken_for_a_rank(where: str, environment: dict[str, str]) -> None:
    assert joined(environment) == {}, where


@pytest.mark.parametrize("rank", range(4))
def test_tasks_in_another_order_are_refused_by_every_rank(rank: int) -> None:
    own = {"SLURM_NODEID": str(rank % 2), "SLURM_LOCALID": str(rank // 2), "SLURM_GTIDS": f"{rank % 2},{rank % 2 + 2}"}
    environment = {**step(rank), **own}
    with pytest.raises(UserError, match="--distribution=block"):
        set_rank_variables(environment)
    assert environment["RANK"] == str(rank)  # so that one of them says it


def test_nodes_with_unequal_numbers_of_tasks_are_refused() -> None:
    uneven = {**step(0), "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NUM_TASKS": "3"}
    with pytest.raises(UserError, match=r"\(2,1\); give it --ntasks-per-node"):
        set_rank_variables(uneven)
    with pytest.raises(UserError, match="deepspeed started 3 ranks on 2 nodes, 2 of them on this one"):
        launched_world({**DEEPSPEED, "WORLD_SIZE": "3", "LOCAL_SIZE": "2"})


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(1, 1, "python alone")),
        (BATCH, World(1, 1, "python alone")),
        (DEEPSPEED, World(8, 4, "deepspeed")),
        (TORCHRUN, World(8, 4, "torchrun")),
        ({**step(1, per_node=1), **TORCHRUN}, World(8, 4, "torchrun")),
        ({**step(5, per_node=4), **DEEPSPEED}, World(8, 4, "deepspeed")),
        ({"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, World(8, 2, "the launcher")),
        ({"RANK": "1", "WORLD_SIZE": "8"}, World(8, None, "the launcher")),
    ],
)
def test_every_launcher_is_known_with_its_world(environment: dict[str, str], world: World) -> None:
    assert launched_world(environment) == world


@pytest.mark.parametrize("value", ["True", "False", "1", "", None])
def test_where_the_store_is_is_decided_as_torch_does(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.rendezvous import _torchelastic_use_agent_store

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", value)
    assert launcher_has_store() is _torchelastic_use_agent_store() is (value == "True")


def config(nodes: int, devices: int, *overrides: str) -> Config:
    """A run for so many, which any of these worlds could have."""
    batch = "train.batch_tokens=8388608"
    return load_config(TINY, [f"cluster.nodes={nodes}", f"cluster.devices_per_node={devices}", batch, *overrides])


def refusal(world: World, config: Config) -> str:
    problem = world.problem(config)
    assert problem is not None
    return problem


@pytest.mark.parametrize(
    ("launcher", "wanted", "how"),
    [
        ("python alone", (1, 8), "deepspeed --num_gpus 8,"),
        ("deepspeed", (1, 8), "deepspeed --num_gpus 8,"),
        ("deepspeed", (8, 8), "8 lines of `HOST slots=8` (see dsmoe launch CONFIG --hostfile),"),
        ("torchrun", (2, 8), "torchrun --nnodes 2 --nproc-per-node 8,"),
        ("srun", (2, 8), "srun --nodes 2 --ntasks-per-node 8,"),
        ("the launcher", (2, 8), "8 processes on each of 2 nodes,"),
    ],
)
def test_another_world_is_refused_with_both_and_the_command(
    launcher: str, wanted: tuple[int, int], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    nodes, devices = wanted
    message = refusal(World(4, 4, launcher), config(nodes, devices))
    assert message.startswith(
        f"{launcher} started 1 x 4 = 4 ranks, but cluster.nodes x cluster.devices_per_node is {nodes} x {devices} = "
        f"{nodes * devices} ranks; start those with "
    )
    assert how in message
    assert message.endswith("with cluster.nodes=1 cluster.devices_per_node=4, or cluster.elastic=true")


def test_python_in_a_jobs_shell_is_told_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    message = refusal(World(1, 1, "python alone"), config(2, 8))
    assert "start those with srun --nodes 2 --ntasks-per-node 8," in message


def test_the_shape_counts_and_not_only_the_number() -> None:
    assert World(4, 2, "torchrun").problem(config(2, 2)) is None
    assert "started 1 x 4 = 4 ranks" in refusal(World(4, 4, "torchrun"), config(2, 2))
    assert World(4, None, "the launcher").problem(config(2, 2)) is None  # which has not said
    assert World(6, None, "the launcher").shape(4) == (1, 6)


RANK = """
import sys
import torch, torch.distributed as dist
from dsmoe.runtime.world import launched_world
from dsmoe.runtime.processes import join_processes, leave_processes
rank = join_processes("cpu", interface="lo")
total = torch.tensor([float(rank.rank + 1)])
dist.all_reduce(total)
assert (rank.world_size, total.item()) == (2, 3.0)
assert launched_world().launcher == "srun" and torch.get_num_threads() == 1
leave_processes()
"""


def test_tasks_join_each_other(tmp_path: Path) -> None:
    """Two processes with no more than Slurm's variables, on the interface that the config names."""
    kept = {"PATH", "PYTHONPATH", "HOME", "DS_ACCELERATOR"}
    base = {name: value for name, value in os.environ.items() if name in kept}
    own = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    environments = [{**base, **step(rank, nodes=1), **own} for rank in range(2)]
    codes, texts = run_side_by_side([[sys.executable, "-c", RANK]] * 2, environments, tmp_path)
    assert codes == [0, 0], texts
