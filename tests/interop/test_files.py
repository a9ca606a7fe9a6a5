"""Safetensors files: what is written is read, by the safetensors library too; what contradicts itself is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe.checkpoint.safetensors import LazyTensor, write_tensors
from dsmoe.config.errors import UserError
from dsmoe.interop.model_files import read_entry, read_header, whole_folder

TENSORS = {
    "wide": torch.randn(3, 4, dtype=torch.float32),
    "narrow": torch.randn(5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 7, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
}


def forge(path: Path, header: dict[str, Any], size: int) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(size)))
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), first: int = 0, last: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    items = [LazyTensor(name, x.dtype, tuple(x.shape), lambda x=x: x) for name, x in TENSORS.items()]
    written, offsets = write_tensors(tmp_path / "file", items, {"format": "pt"})
    assert written.bytes == (tmp_path / "file").stat().st_size
    entries = read_header(tmp_path / "file")
    assert [entries[name].offset for name in TENSORS] == offsets
    for name, tensor in TENSORS.items():
        assert torch.equal(read_entry(entries[name]), tensor)
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = safetensors.load_file(tmp_path / "file")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in TENSORS.items())


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    header = {"byte": entry("U8", (1,), 0, 1), "wide": entry("F32", (2,), 1, 9)}
    for pad in range(4):  # wherever the data begin
        path = forge(tmp_path / "file", {**header, "__metadata__": {"x": "y" * pad}}, 9)
        expected = torch.frombuffer(bytearray(range(1, 9)), dtype=torch.float32)
        assert torch.equal(read_entry(read_header(path)["wide"]), expected)


FORGED: dict[str, tuple[dict[str, Any], int, str]] = {
    "more elements than bytes": ({"a": entry(shape=(1000,))}, 8, "contradicts itself"),
    "fewer than none": ({"a": entry(shape=(-1, -2))}, 8, "contradicts itself"),
    "before the data": ({"a": entry(first=-8, last=0)}, 8, "contradicts itself"),
    "behind the file": ({"a": entry(first=8, last=16)}, 8, "bytes, and its header describes"),
    "a gap": ({"a": entry(), "b": entry(first=12, last=20)}, 20, "one after the other"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, 16, "one after the other"),
    "another type": ({"a": entry("F8_E4M3", (8,))}, 8, "elements of type F8_E4M3"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
    "no mapping": ({"a": [1]}, 8, "is not a whole safetensors file"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(forged: str, tmp_path: Path) -> None:
    header, size, message = FORGED[forged]
    with pytest.raises(UserError) as error:
        read_header(forge(tmp_path / "file", header, size))
    assert message in str(error.value)
    assert str(tmp_path / "file") in str(error.value)


def test_a_disk_that_is_full_is_an_error_with_the_files_name_and_leaves_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("Linux only")
    item = LazyTensor("a", torch.float32, (100_000,), lambda: torch.zeros(100_000))
    with (
        pytest.raises(UserError, match=r"cannot write /dev/full: No space left on device"),
        whole_folder(tmp_path / "a"),
    ):
        write_tensors(Path("/dev/full"), [item])
    assert not list(tmp_path.iterdir())
