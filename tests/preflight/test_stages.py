"""Ranks that really measure, on this machine."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsmoe.config import dump_config, load_config
from dsmoe.plan.plan import Plan
from dsmoe.preflight import check_nodes, stages
from dsmoe.preflight.measure import copy_rate, link_rates, memory_gib, product_rate, write_rate
from dsmoe.preflight.results import Link
from dsmoe.preflight.workload import Product, messages
from dsmoe.runtime.spawn import RanksFailedError, run_ranks
from dsmoe.runtime.start import begin_command
from tests.helpers.small_runs import small_config

CPU = torch.device("cpu")


def write_config(folder: Path, nodes: int, per_node: int, timeout: int = 30, **sections: object) -> Path:
    cluster = {"nodes": nodes, "devices_per_node": per_node, "collective_timeout_seconds": timeout}
    config = small_config(folder, cluster=cluster, **sections)  # type: ignore[arg-type]
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def check(path: Path, overrides: list[str] | None = None) -> int:
    per_node = min(load_config(path).cluster.devices_per_node, dist.get_world_size())
    os.environ.update(LOCAL_RANK=str(dist.get_rank() % per_node), LOCAL_WORLD_SIZE=str(per_node))
    with (path.parent / f"stderr_{dist.get_rank()}").open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    check_nodes.leave_processes = lambda: None  # run_ranks does
    return check_nodes.check_cluster(begin_command(str(path), overrides or []), None)


def stderr(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("stderr_*")))


def results(folder: Path) -> dict:
    assert not list((folder / "runs" / "small").glob(".preflight_*")), "nothing is left but the results"
    return json.loads((folder / "runs" / "small" / "preflight.json").read_text(encoding="utf-8"))


def test_products_are_the_same_on_every_call_and_faster_than_nothing() -> None:
    product = Product("experts", rows=64, inner=32, width=48, count=4)
    rate, checksum = product_rate(product, CPU, torch.float32)
    assert rate > 0
    assert product_rate(product, CPU, torch.float32)[1] == checksum
    # The mean size of a sum of 32 products of normal numbers.
    assert checksum == pytest.approx(math.sqrt(32) * math.sqrt(2 / math.pi), rel=0.1)
    assert product_rate(product, CPU, torch.bfloat16)[1] == pytest.approx(checksum, rel=0.1)


def test_copies_and_files_take_time(tmp_path: Path) -> None:
    assert copy_rate(CPU, 2**20) > 0
    assert write_rate(tmp_path / "file") > 0
    assert (tmp_path / "file").stat().st_size == 0
    total, free = memory_gib(CPU)
    assert total > free > 0


def meet_all() -> list[Link]:
    rank = dist.get_rank()
    rounds = {0: [1, 2, None], 1: [0, None, 2], 2: [None, 0, 1]}
    return link_rates(rounds[rank], CPU, 2**20)


def test_links_are_exchanges_with_each_partner() -> None:
    links = run_ranks(3, meet_all)
    assert [[link.peer for link in found] for found in links] == [[1, 2], [0, 2], [0, 1]]
    assert all(link.gbps > 0 and link.us > 0 for found in links for link in found)


@pytest.mark.parametrize(
    ("nodes", "layout"),
    [(1, {"expert": 4}), (2, {"expert": 4, "all_to_all": "hierarchical"}), (2, {"expert": 2, "tensor": 2})],
)
def test_every_rank_measures_everything(nodes: int, layout: dict[str, object], tmp_path: Path) -> None:
    path = write_config(tmp_path, nodes, 4 // nodes, parallel=layout)
    assert len(set(run_ranks(4, check, path))) == 1
    found = results(tmp_path)
    config = load_config(path)
    for rank in found["ranks"]:
        assert set(rank["tflops"]) == set(rank["checksums"]) == {"square", "output head", "experts"}
        assert set(rank["collective_gbps"]) == {message.name for message in messages(Plan.from_config(config))}
        assert min([*rank["tflops"].values(), *rank["collective_gbps"].values(), rank["memory_gbps"]]) > 0
        assert {link["peer"] // (4 // nodes) for link in rank["links"]} == set(range(nodes))
        assert rank["host"] == socket.gethostname()
    assert [rank["storage_gbps"] is not None for rank in found["ranks"]].count(True) == nodes
    assert not list((tmp_path / "runs" / "small").glob(".preflight_*"))


def test_one_rank_is_enough(tmp_path: Path) -> None:
    assert run_ranks(1, check, write_config(tmp_path, 1, 1)) == [0]
    assert results(tmp_path)["findings"] == []


def check_with_another_text(path: Path) -> int:
    return check(path, ["train.steps=11"] if dist.get_rank() == 1 else [])


def test_another_config_on_a_rank_ends_it_before_anything_is_measured(tmp_path: Path) -> None:
    assert run_ranks(2, check_with_another_text, write_config(tmp_path, 1, 2)) == [1, 1]
    found = results(tmp_path)
    assert [text["text"].split(":")[0] for text in found["findings"]] == ["config differs"]
    assert found["ranks"][0]["links"] == []


def check_with_a_broken_device(path: Path) -> int:
    if dist.get_rank() == 1:

        def broken(*_: object) -> None:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nand a page more")

        stages.product_rate = broken  # type: ignore[assignment]
    return check(path)


def test_a_device_that_fails_is_a_finding(tmp_path: Path) -> None:
    assert run_ranks(2, check_with_a_broken_device, write_config(tmp_path, 1, 2)) == [1, 1]
    (finding,) = results(tmp_path)["findings"]
    assert finding["text"].endswith("device 1): RuntimeError: CUDA error: uncorrectable ECC error encountered")


def check_on_read_only_storage(path: Path) -> int:
    def refuse(path: Path) -> float:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    stages.write_rate = refuse
    return check(path)


def test_a_run_folder_that_cannot_be_written_is_a_finding_beside_the_numbers(tmp_path: Path) -> None:
    assert run_ranks(1, check_on_read_only_storage, write_config(tmp_path, 1, 1)) == [1]
    found = results(tmp_path)
    assert "Read-only file system; see runs_dir" in found["findings"][0]["text"]
    assert found["checks"]
    assert stderr(tmp_path) == ""


def check_elsewhere(path: Path, folders: list[Path]) -> int:
    os.chdir(folders[dist.get_rank() // 2])
    stages.VISIBLE_SECONDS = 0.2
    return check(path, ["runs_dir=runs"])


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        (folder / "runs" / "small").mkdir(parents=True)
    path = write_config(tmp_path, 2, 2, parallel={"expert": 2})
    assert run_ranks(4, check_elsewhere, path, folders) == [1] * 4
    texts = [finding["text"] for finding in results(folders[0])["findings"] if finding["serious"]]
    texts = [text for text in texts if "run folder" in text or "has written there" in text]  # not of a busy machine
    assert len(texts) == 2
    assert "what node 1 has written there; runs_dir must be on storage that all nodes share" in texts[0]


def check_with_a_sleeper(path: Path) -> int:
    def sleep(*_: object) -> float:
        while "rank 1 on" not in stderr(path.parent):
            time.sleep(0.1)
        os._exit(1)

    if dist.get_rank() == 1:
        stages.copy_rate = sleep
    return check(path)


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError):
        run_ranks(2, check_with_a_sleeper, write_config(tmp_path, 1, 2, timeout=5))
    said = stderr(tmp_path)
    assert "step 3, run folder: rank 1 on" in said
    assert "missing: alive, but still at step 2, products and memory copies (no word of 1 " in said


def test_a_world_of_another_size_is_the_users_error(tmp_path: Path) -> None:
    assert run_ranks(2, check, write_config(tmp_path, 1, 4, parallel={"expert": 4})) == [2, 2]
    assert stderr(tmp_path).count("started 1 x 2 = 2 ranks, but cluster.nodes x cluster.devices_per_node is 1 x 4") == 1
