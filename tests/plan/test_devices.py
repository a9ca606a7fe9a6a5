"""The device table, and what an unknown name is told."""

from __future__ import annotations

import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Device
from dsmoe.plan import KNOWN_DEVICES, DeviceFacts, known_device, resolve_device


def test_a_known_name() -> None:
    assert resolve_device("h100-sxm") == DeviceFacts("h100-sxm", memory_gib=79.1, peak_tflops=989.5)


def test_the_cpu_has_no_peak_and_so_no_mfu() -> None:
    assert resolve_device("cpu") == DeviceFacts("cpu", memory_gib=None, peak_tflops=None)


def test_nothing_said_is_nothing_known() -> None:
    assert resolve_device(None) is None


def test_a_description_is_taken_as_it_is() -> None:
    facts = resolve_device(Device(memory_gib=31.5, peak_tflops=100.0))
    assert facts is not None
    assert (facts.memory_gib, facts.peak_tflops) == (31.5, 100.0)


@pytest.mark.parametrize(("name", "similar"), [("h100_sxm", "h100-sxm"), ("H200", "h200"), ("a100-80", "a100-80gb")])
def test_an_unknown_name_is_told_the_similar_one_and_all_others(name: str, similar: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{similar}'") as caught:
        resolve_device(name)
    assert f"cluster.device ({name!r})" in str(caught.value)
    for known in KNOWN_DEVICES:
        assert known in str(caught.value)


def test_a_name_like_no_other_gets_the_list_without_a_guess() -> None:
    with pytest.raises(UserError) as caught:
        resolve_device("trainium")
    assert "did you mean" not in str(caught.value)
    assert "known: a100-40gb" in str(caught.value)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-SXM4-40GB", "a100-40gb"),  # as older drivers have it
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_device_is_known_by_what_torch_calls_it(reported: str, name: str) -> None:
    assert known_device(reported) == name
    assert name in KNOWN_DEVICES


@pytest.mark.parametrize(
    "reported",
    [
        *("NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        *("NVIDIA A100-SXM-64GB", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "Tesla V100-SXM2-16GB", "", "cpu"),
    ],
)
def test_a_relative_of_a_known_device_is_not_taken_for_it(reported: str) -> None:
    assert known_device(reported) is None
