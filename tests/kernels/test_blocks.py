"""The table of block sizes: what stands in it, what is refused, and that no size changes what a kernel computes."""

from __future__ import annotations

import copy
import fnmatch
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import dsmoe
from dsmoe.kernels import blocks
from dsmoe.kernels.bag_sum import bag_sum
from dsmoe.kernels.permute import count_by_expert, sort_by_expert
from dsmoe.kernels.weighted_activation import weighted_activation, weighted_activation_backward
from dsmoe.nn.activations import ACTIVATIONS
from tests.kernels import DTYPES, OTHER_SIZES, test_bag_sum, test_topk_router, test_weighted_activation
from tests.moe import DEVICE

SETS = [dict(zip(OTHER_SIZES, sizes, strict=True)) for sizes in zip(*OTHER_SIZES.values(), strict=True)] + [
    blocks.choose(blocks.read(blocks.TABLE), capability)
    for capability in blocks.read(blocks.TABLE)
    if capability != "default"
]


@pytest.fixture(params=SETS)
def other_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, blocks.Sizes]:
    for kernel, sizes in request.param.items():
        monkeypatch.setitem(blocks.SIZES, kernel, sizes)
    return request.param


@pytest.mark.usefixtures("other_sizes")
def test_kernels_are_their_twins_at_other_sizes() -> None:
    for dtype in DTYPES:
        for name in ("swiglu", "gelu"):
            for num_rows, inner in test_weighted_activation.SHAPES:
                test_weighted_activation.test_kernels_are_their_twin(name, num_rows, inner, dtype)
        for bags in ((7, 3, 21, 40), (5, 11, 20, 8), (3, 2, 6, 1500), (0, 2, 4, 8), (6, 1, 9, 1024)):
            test_bag_sum.test_kernel_is_its_twin(*bags, dtype)
    for score in ("softmax", "sigmoid"):
        for shape in test_topk_router.SHAPES:
            test_topk_router.test_kernels_are_their_twin(score, True, 2.5, "both", shape)
    for num_assignments in (0, 1, 64, 513):
        experts_A = torch.randint(0, 8, (num_assignments,), device=DEVICE)
        counts_E, order_A, expert_A, _ = sort_by_expert(experts_A, 7)
        assert torch.equal(order_A, experts_A.argsort(stable=True))
        assert torch.equal(expert_A, experts_A[order_A])
        assert torch.equal(counts_E, count_by_expert(experts_A, 7))
        assert torch.equal(counts_E.cpu(), experts_A.cpu().bincount(minlength=8)[:7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_summed_within_a_program_has_the_same_bits_at_any_size(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_ND, row_UK = torch.randn(20, 300, device=DEVICE).to(dtype), torch.randint(0, 22, (9, 5), device=DEVICE)
    z_NZ, grad_NI, weight_N = test_weighted_activation.inputs("swiglu", 37, 40, dtype)
    ends_L = torch.tensor([37], dtype=torch.int32, device=DEVICE)

    def results() -> list[torch.Tensor]:
        backward = weighted_activation_backward(grad_NI, z_NZ, weight_N, ends_L, ACTIVATIONS["swiglu"])
        return [
            bag_sum(rows_ND, row_UK),
            weighted_activation(z_NZ, weight_N, ends_L, ACTIVATIONS["swiglu"]),
            *backward[:2],
        ]

    expected = results()
    for sizes in SETS:
        for kernel in sizes:
            monkeypatch.setitem(blocks.SIZES, kernel, sizes[kernel])
        for result, other in zip(results(), expected, strict=True):
            assert torch.equal(result, other)


def test_without_a_measured_capability_the_sizes_are_these() -> None:
    table = blocks.read(blocks.TABLE)
    activation = {"tile": 2048, "columns": 256, "warps": 4}
    assert blocks.choose(table, "cpu") == {
        "activation_backward": activation,
        "activation_forward": activation,
        "bag_sum": {"columns": 1024, "columns_per_warp": 256, "unroll": 8},
        "permute": {"block": 128, "warps": 4},
        "topk_router": {"tile": 2048, "warps": 4},
    }
    assert blocks.choose(table, blocks.capability()) == blocks.SIZES
    if DEVICE == "cpu":
        assert blocks.capability() == "cpu"


def test_a_measured_capability_has_its_own_and_the_default_for_the_rest() -> None:
    table = blocks.read(blocks.TABLE)
    sizes = {"block": 64, "warps": 2}
    table["sm_75"] = {"permute": {"sizes": sizes, "device": "NVIDIA T4", "date": "2026-11-27"}}
    blocks.check(table, blocks.TABLE)
    assert blocks.choose(table, "sm_75") == {**blocks.choose(table, "cpu"), "permute": sizes}


def test_capability_is_that_of_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert blocks.capability() == "sm_90"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert blocks.capability() == "cpu"
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm counts otherwise: its 9.0 is an MI250
    assert blocks.capability() == "cpu"


MEASURED = {"sizes": {"block": 64, "warps": 2}, "device": "NVIDIA H100", "date": "2026-11-27"}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["default"], None, "default: missing"),
        (["default", "permute"], None, "default.permute: missing; add it"),
        (["h100"], {}, "h100: unknown key; expected default or sm_90"),
        (["sm90"], {}, "sm90: unknown key; did you mean 'sm_90'?"),
        (["sm_90"], [], r"sm_90: \[\]; must be an object"),
        (["sm_90"], {"permutation": MEASURED}, "sm_90.permutation: unknown key; did you mean 'permute'?"),
        (["sm_90", "permute"], {**MEASURED, "speedup": 2}, "sm_90.permute.speedup: unknown key; expected sizes or"),
        (["sm_90", "permute", "date"], None, "sm_90.permute.date: missing"),
        (["sm_90", "permute", "sizes", "warps"], None, "sm_90.permute.sizes.warps: missing"),
        (["sm_90", "permute", "sizes", "warp"], 4, "sm_90.permute.sizes.warp: unknown key; did you mean 'warps'?"),
        (["sm_90", "permute", "sizes", "warps"], 64, "warps: 64; must be a power of two from 1 to 32"),
        (["sm_90", "permute", "sizes", "block"], 96, "block: 96; must be a power of two from 1 to 65536"),
        (["default", "permute", "sizes", "block"], 0, "default.permute.sizes.block: 0; must be a power of two"),
        (["default", "permute", "sizes", "block"], True, "block: True; must"),
        (["default", "permute", "sizes", "block"], "64", "block: '64'; must"),
    ],
)
def test_a_malformed_table_is_refused_by_file_key_and_remedy(
    place: list[str], value: Any, message: str, tmp_path: Path
) -> None:
    table: dict[str, Any] = copy.deepcopy({**blocks.read(blocks.TABLE), "sm_90": {"permute": MEASURED}})
    inside = table
    for key in place[:-1]:
        inside = inside[key]
    if value is None:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ValueError, match=f"blocks.json: .*{message}"):
        blocks.read(path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    path.write_text(blocks.TABLE.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(ValueError, match=r"blocks.json: not JSON .* restore the file"):
        blocks.read(path)


def test_an_installed_package_has_every_file_that_is_no_module() -> None:
    package = Path(dsmoe.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = project["tool"]["setuptools"]["package-data"]
    found = [file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert blocks.TABLE in found
    for file in found:
        patterns = shipped.get(".".join(file.parent.relative_to(package.parent).parts), [])
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns), f"{file}: not in package-data"
