"""Ranks that come with other settings than rank 0, or cannot start: one text, on all of them."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dsmoe.runtime.consistency import (
    MAX_QUERIED_RANKS,
    Mismatch,
    RankMismatchError,
    check_all_ranks_agree,
    combined_exit_code,
    explain,
)
from dsmoe.runtime.processes import join_processes, leave_processes
from dsmoe.runtime.rendezvous_barrier import report_to_rank_0
from dsmoe.runtime.spawn import CONTEXT, run_ranks
from tests.helpers.ports import free_port

SAME = {"optimizer.lr": "0.001", "train.seed": "0", "torch": "2.13.0"}
HOST = socket.gethostname()


def come(rank: int, world: int, port: str, fingerprint: dict[str, str] | str, folder: Path) -> None:
    """Join with a fingerprint, or report to rank 0 why not, and the exit code; write the outcome to a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if isinstance(fingerprint, str):
        code, _, reason = fingerprint.partition(" ")
        result = f"rank 0 has said so: {report_to_rank_0(reason, int(code))}"
    else:
        try:
            join_processes("cpu", timedelta(seconds=30), fingerprint=fingerprint)
            dist.barrier()
            result = "joined"
            leave_processes()
        except RankMismatchError as error:
            result = f"{error.exit_code} {error}"
    (folder / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def results_of(fingerprints: list[dict[str, str] | str], folder: Path) -> list[str]:
    port = free_port()
    arguments = [(rank, len(fingerprints), port, own, folder) for rank, own in enumerate(fingerprints)]
    processes = [CONTEXT.Process(target=come, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(len(fingerprints))]


def test_ranks_with_the_same_fingerprint_join(tmp_path: Path) -> None:
    assert results_of([SAME, SAME, SAME], tmp_path) == ["joined"] * 3


def test_what_differs_is_named_with_both_values_and_the_ranks(tmp_path: Path) -> None:
    warmer = {**SAME, "optimizer.lr": "0.01"}
    older = {**SAME, "torch": "2.11.0"}
    less = {name: value for name, value in SAME.items() if name != "train.seed"} | {"numpy": "2.4.0"}
    results = results_of([SAME, warmer, warmer, {**older, "optimizer.lr": "0.01"}, less], tmp_path)
    assert (
        results
        == [
            "2 4 ranks of 5 would not train what rank 0 does; "
            "give every host the same config, data, packages and dsmoe:\n"
            f"  - optimizer.lr: 0.001 on rank 0; 0.01 on ranks 1-3 on {HOST}\n"
            f"  - torch: 2.13.0 on rank 0; 2.11.0 on rank 3 on {HOST}\n"
            f"  - train.seed: 0 on rank 0; nothing on rank 4 on {HOST}\n"
            f"  - numpy: nothing on rank 0; 2.4.0 on rank 4 on {HOST}"
        ]
        * 5
    )


@pytest.mark.parametrize("code", [1, 2])
def test_rank_0_reports_for_a_rank_that_cannot_start(code: int, tmp_path: Path) -> None:
    text = f"{code} 1 rank of 3 cannot start:\n  - rank 2 on {HOST}: moe.num_expert: unknown key"
    assert results_of([SAME, SAME, f"{code} moe.num_expert: unknown key"], tmp_path) == [
        text,
        text,
        "rank 0 has said so: True",
    ]


def test_where_one_of_them_is_a_persons_to_mend_no_other_try_will_do() -> None:
    may_pass, will_not = Mismatch(1, HOST, {}, "no room", 1), Mismatch(2, HOST, {}, "no such key", 2)
    assert combined_exit_code([may_pass, will_not]) == combined_exit_code([will_not, may_pass]) == 2
    assert combined_exit_code([may_pass]) == 1
    assert combined_exit_code([]) == 2


def test_a_rank_alone_reports_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not report_to_rank_0("anything", 2)


def compared(fingerprints: list[dict[str, str]]) -> str:
    try:
        check_all_ranks_agree(fingerprints[dist.get_rank()])
    except RankMismatchError as error:
        return str(error)
    return "alike"


def test_ranks_that_have_joined_compare_as_well() -> None:
    assert run_ranks(2, compared, [{"web": "5 tokens"}, {"web": "5 tokens"}]) == ["alike"] * 2
    first, second = run_ranks(2, compared, [{"web": "5 tokens"}, {"web": "6 tokens"}])
    assert first == second
    assert f"web: 5 tokens on rank 0; 6 tokens on rank 1 on {HOST}" in first


def test_a_text_about_thousands_of_ranks_and_keys_stays_short() -> None:
    first = {f"key{i}": "0" for i in range(500)}
    other = {f"key{i}": "1" * 5000 for i in range(500)}
    mismatches = [Mismatch(rank, f"host{rank // 8}", other) for rank in range(1, MAX_QUERIED_RANKS + 1)]
    text = explain(first, mismatches, 2047, 2048)
    assert text.startswith("2,047 ranks of 2,048 would not train what rank 0 does")
    assert text.endswith("and 480 more")
    assert len(text) < 20_000
