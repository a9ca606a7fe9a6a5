"""One layer beside its peers: what is left out says why, and what was measured is kept whatever comes after."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import moe_layer, peers
from benchmarks.measuring import RESULTS
from benchmarks.moe_layer import KERNELS, OURS, SHAPES, Times, main, summarise
from benchmarks.peers import PEERS, DenseFloor, LigerGrouped, Peer, check_memory

QUICK = ["dense floor", OURS, "deepspeed no drop"]
MEASURED = {"forward_ms", "training_ms", "forward_tflops", "training_tflops", "share_of_matrix_rate", "repeats"}


@pytest.fixture(autouse=True)
def _no_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_layer, "product_rate", lambda *_: (2.0, 0.0))


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str, peers: list[str] = QUICK) -> list[dict[str, Any]]:
    """The rows that `python -m benchmarks.moe_layer` leaves."""
    file = folder / "rows.jsonl"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--dtypes", "fp32", "--peers", *peers, "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["moe_layer", *arguments, *options, "--rows", str(file)])
    main()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "layer"]


def test_every_peer_has_a_row_for_both_routings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    rows = run(monkeypatch, tmp_path, "--tokens", "16", peers=list(PEERS))
    assert rows[0] == {"kind": "matrix_rate", "dtype": "fp32", "size": 1024, "tflops": 2.0}
    found = {(row["routing"], row["tokens"], row["peer"]): row for row in layers(rows)}
    assert len(found) == len(layers(rows)) == 2 * len(PEERS)
    for (routing, tokens, peer), row in found.items():
        assert routing in ("balanced", "zipf")
        assert tokens == 16
        if peer == "liger grouped":
            assert "error" in row
        elif "transformers" not in peer or "error" not in row:  # an optional package
            assert row.keys() >= MEASURED
            assert row["share_of_matrix_rate"] == row["training_tflops"] / 2.0
            assert row["training_ratio"] > 0
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before, "with --rows somebody else writes"


def test_a_peer_that_fails_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Failing(nn.Module):
        def __init__(self, error: Exception) -> None:
            super().__init__()
            self.error = error

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise self.error

    def not_installed(_: object) -> nn.Module:
        raise ImportError("no such package")

    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.\nSee the manual.")
    monkeypatch.setitem(PEERS, "raises", lambda _: Failing(ValueError("not this shape\nand why")))
    monkeypatch.setitem(PEERS, "too large", lambda _: Failing(memory))
    monkeypatch.setitem(PEERS, "missing", not_installed)
    monkeypatch.setitem(PEERS, "silent", lambda _: Failing(RuntimeError()))
    freed: list[bool] = []
    monkeypatch.setattr(moe_layer, "free_memory", lambda: freed.append(True))
    names = ["dense floor", "raises", "too large", "missing", "silent", OURS]
    rows = layers(run(monkeypatch, tmp_path, "--routing", "balanced", peers=names))
    errors = {row["peer"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "raises": "not this shape",
        "too large": "CUDA out of memory. Tried to allocate 40.00 GiB.",
        "missing": "no such package",
        "silent": "RuntimeError",
    }
    assert {row["peer"] for row in rows if "error" not in row} == {"dense floor", OURS}
    assert len(freed) == 1 + len(errors)


def test_a_peer_may_fail_after_its_first_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Tiring(DenseFloor):
        passes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            if self.passes > 3:
                raise RuntimeError("tired")
            return super().forward(x)

    monkeypatch.setitem(PEERS, "dense floor", Tiring)
    rows = layers(run(monkeypatch, tmp_path, "--routing", "balanced"))
    assert [(row["peer"], row.get("error")) for row in rows] == [
        ("dense floor", "tired"),
        (OURS, None),
        ("deepspeed no drop", None),
    ]
    assert all(row["training_ratio"] is None for row in rows[1:]), "there is no floor to compare with"


def test_the_first_row_is_measured_even_after_the_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path, "--seconds", "0", "--profile", "--repeats", "9")
    (row,) = layers(rows)
    assert (row["peer"], row["routing"], row["repeats"]) == (OURS, "balanced", 3)
    assert [row["kind"] for row in rows] == ["matrix_rate", "layer", "checks", "checks"]
    assert [row["passed"] for row in rows[2:]] == [True, None], "the other routing was not reached"


def test_settings_come_in_order_of_worth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--shapes", "tiny", "A", "--tokens", "2", "1", "--peers", "dense floor")
    rows = layers(run(monkeypatch, tmp_path, *options))
    order = [(row["shape"], row["tokens"], row["routing"]) for row in rows]
    differing = [sum(found != wanted for found, wanted in zip(row, order[0], strict=True)) for row in order]
    assert order[0] == ("tiny", 2, "balanced")
    assert differing == [0, 1, 1, 1, 2, 2, 2, 3]


def test_a_profile_shows_ours_and_the_best_other_peer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(monkeypatch, tmp_path, "--profile", "--routing", "balanced")
    kernels = [row for row in rows if row["kind"] == "kernel"]
    for peer in (OURS, "deepspeed no drop"):
        of_peer = [row for row in kernels if row["peer"] == peer]
        assert 0 < len(of_peer) <= KERNELS
        assert [row["ms"] for row in of_peer] == sorted((row["ms"] for row in of_peer), reverse=True)
        assert 0 < sum(row["percent"] for row in of_peer) <= 100.001
        assert all(row["calls"] > 0 and 0 < len(row["name"]) <= 80 for row in of_peer)
    assert {row["peer"] for row in kernels} == {OURS, "deepspeed no drop"}
    assert kernels[0]["name"] in capsys.readouterr().out


def test_figures_follow_from_seconds() -> None:
    shape = SHAPES["A"]
    floor, times = Times(0, None, [1.0, 2.0], [2.0, 4.0]), Times(4096 * 2048, 2**31, [2.0, 2.0], [3.0, 5.0])
    row = summarise(shape, times, floor, rate=1e-3)
    flops = 2 * 3 * 512 * 1024 * 2 * 4096  # three products; two choices
    assert (row["forward_ms"], row["training_ms"]) == (2000.0, 4000.0)
    assert (row["forward_ratio"], row["training_ratio"]) == (1.5, 1.375)
    assert row["forward_tflops"] == pytest.approx(flops / 2 / 1e12)
    assert row["training_tflops"] == pytest.approx(3 * flops / 4 / 1e12)
    assert row["share_of_matrix_rate"] == pytest.approx(row["training_tflops"] / 1e-3)
    assert (row["saved_kib_per_token"], row["peak_gib"], row["repeats"]) == (2.0, 2.0, 2)


def test_padding_that_cannot_fit_is_left_out_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["tiny"]
    x_TD, router_ED, _ = moe_layer.inputs(shape, torch.float32, "zipf", "cpu")
    check_memory("deepspeed no drop", shape, x_TD, router_ED)
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(peers.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MemoryError, match=r"4 experts padded to the \d+ rows of the fullest"):
        check_memory("deepspeed no drop", shape, x_TD, router_ED)
    check_memory(OURS, shape, x_TD, router_ED)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "liger grouped"])
def test_layers_are_made_on_the_device(name: str) -> None:
    """On `meta` nothing can be computed: what would be made on the CPU first shows."""
    made: list[torch.device] = []
    register = nn.Module.register_parameter

    def note(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            made.append(parameter.device)
        register(module, key, parameter)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.Module, "register_parameter", note)
        try:
            Peer(name, SHAPES["tiny"], torch.empty(4, 32, device="meta"))
        except ImportError:
            pytest.skip("transformers is not installed")
    assert {device.type for device in made} == {"meta"}


def test_liger_needs_a_cuda_device() -> None:
    with pytest.raises(RuntimeError, match="CUDA"), torch.device("cpu"):
        LigerGrouped(SHAPES["tiny"])


def test_ligers_autotuner_gets_few_of_its_variants() -> None:
    """The lists are those of liger-kernel 0.8.5."""

    def tried(names: str, *values: tuple[int, ...]) -> int:
        count = 0
        for each in itertools.product(*values):
            tile = dict(zip(names.split(), each, strict=True))
            warps, stages = tile.pop("warps"), tile.pop("stages")
            count += peers._is_tried(SimpleNamespace(kwargs=tile, num_warps=warps, num_stages=stages))
        return count

    assert tried("BLOCK_N BLOCK_K warps stages", (64, 128), (32, 64), (4, 8), (2, 3, 4, 5)) == 4
    assert tried("BLOCK_M BLOCK_N BLOCK_K warps stages", (64, 128), (64, 128), (16, 32), (4, 8), (2,)) == 4
    assert tried("BLOCK_H BLOCK_K warps stages", (64, 128, 256, 512), (1, 2, 4, 8, 16), (4, 8), (4,)) == 2
