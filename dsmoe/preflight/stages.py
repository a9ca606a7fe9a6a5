"""The stages of preflight on each rank: each fills a part of the report, and rank 0 decides whether to go on.

The stages are this process' steps in `dsmoe.runtime.watchdog`: whoever hangs or dies is named with the stage it was in.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch

from dsmoe.config.dump import dump_config
from dsmoe.config.schema import Config
from dsmoe.parallel import Groups
from dsmoe.plan import Plan
from dsmoe.preflight.judge import ON_DEVICES, ON_HOSTS, Verdict, Workload, judge
from dsmoe.preflight.measure import (
    GIB,
    collective_rate,
    copy_rate,
    link_rates,
    memory_gib,
    product_rate,
    wait_for_all,
    write_rate,
)
from dsmoe.preflight.meeting import Answer, meet, part
from dsmoe.preflight.results import SQUARE, Promise, RankReport
from dsmoe.preflight.workload import Pairs, Product, group_ranks, messages, products, rounds
from dsmoe.runtime.processes import Rank, set_group_timeouts
from dsmoe.runtime.watchdog import process_watchdog
from dsmoe.train.environment import package_version, worth_recording

_STEERING = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_DEVICE_", "OMP_NUM_THREADS", "UCX_", "FI_")
_DRIVER = Path("/proc/driver/nvidia/version")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BYTES_PER_PARAMETER = 12
"""Bytes of a parameter in a checkpoint: fp32 weights and two moments."""
MOST_ROOM = 2**30
VISIBLE_SECONDS = 5.0
"""Seconds after which a network file system may show a new file."""


class Preflight:
    """The checks of one rank; `run` does all of them."""

    def __init__(self, plan: Plan, rank: Rank, folder: Path, timeout: timedelta) -> None:
        self.plan, self.config, self.topology = plan, plan.config, plan.topology
        self.rank = rank
        self.folder = folder
        self.timeout = timeout
        self.report = RankReport(rank.rank, self.topology.node_of(rank.rank), rank.local_rank, platform.node())
        self._reports: Sequence[RankReport] = ()  # of all ranks, on rank 0
        self._sizes: dict[str, str] = {}
        self._room = 0
        self._stage = 0
        self._marker: Path | None = None  # what this node has written into the run folder

    @property
    def is_cuda(self) -> bool:
        """True where this rank drives a device of its own."""
        return self.rank.device.type == "cuda"

    def run(self) -> None:
        """Everything, or as much as can be done with what was found."""
        self._begin("versions, config and memory")
        self._describe()
        answer = self._meet("what it is", self._decide_room)
        if not answer["go_on"]:
            return
        self._room = answer["room"]
        self._begin("products and memory copies")
        self._measure_device()
        self._begin("run folder")
        self._write(answer["token"])
        if not self._meet("what it can do", _nobody_has_problems)["go_on"]:
            return
        self._look(answer["token"])
        self._begin("links")
        self._measure_links()
        self._begin("the run's own messages")
        groups = Groups(self.topology, self.timeout)
        set_group_timeouts(self.timeout)
        self._measure_messages(groups)

    def end(self, conclude: Callable[[Verdict, Sequence[RankReport]], int]) -> int:
        """Give the verdict by `conclude` on rank 0, and return its exit code on all ranks."""
        answer = self._meet("its end", lambda reports: {"exit_code": conclude(self._verdict(), reports)})
        if self._marker is not None:
            with contextlib.suppress(OSError):  # a folder that cannot be written is a finding, and this is no other
                self._marker.unlink()
        part()
        return int(answer["exit_code"])

    def _verdict(self) -> Verdict:
        cluster, facts = self.config.cluster, self.plan.device
        promise = Promise(
            memory_gib=facts.memory_gib if facts else None,
            peak_tflops=facts.peak_tflops if facts else None,
            intra_node_gbps=cluster.intra_node_gbps,
            inter_node_gbps=cluster.inter_node_gbps,
            intra_node_us=cluster.intra_node_us,
            inter_node_us=cluster.inter_node_us,
        )
        free = shutil.disk_usage(self.folder).free / GIB if self.folder.exists() else float("inf")
        each = self.plan.parameters.total * BYTES_PER_PARAMETER / GIB
        workload = Workload(
            sizes=self._sizes,
            groups={m.name: group_ranks(self.topology, m) for m in messages(self.plan)},
            checkpoints_gib=each * (self.config.checkpoint.keep + 1),
            free_storage_gib=free,
        )
        return judge(self._reports, promise, ON_DEVICES if self.is_cuda else ON_HOSTS, workload)

    def _begin(self, what: str) -> None:
        self._stage += 1
        process_watchdog().record(what, step=self._stage)
        if self.rank.is_first:
            print(f"{self._stage}/5 {what}", flush=True)

    def _meet(self, name: str, decide: Callable[[Sequence[RankReport]], Answer]) -> Answer:
        def hear(reports: Sequence[RankReport]) -> Answer:
            self._reports = reports
            return decide(reports)

        return meet(name, self.report, hear, self.timeout)

    def _describe(self) -> None:
        report = self.report
        report.versions = versions(self.config, self.rank.device)
        report.environment = steering(os.environ)
        report.memory_total_gib, report.memory_free_gib = memory_gib(self.rank.device)
        wait_for_all(self.rank.device)
        report.clock = time.time()
        if self.rank.is_first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                report.storage_problem = f"cannot make {self.folder.absolute()}: {error.strerror}; see runs_dir"

    def _decide_room(self, reports: Sequence[RankReport]) -> Answer:
        """Decide whether all ranks have the same config, and how many bytes a rank's buffers may take."""
        sharing = 1 if self.is_cuda else self.topology.devices_per_node
        room = min(report.memory_free_gib or 0.0 for report in reports) * GIB / sharing / 8
        one_config = len({report.versions["config"] for report in reports}) == 1
        return {"go_on": one_config, "room": int(min(room, MOST_ROOM)), "token": uuid.uuid4().hex[:8]}

    def _measure_device(self) -> None:
        """Products and copies; an error of the device's is a finding, and others are not kept waiting by it."""
        device, dtype = self.rank.device, DTYPES[self.config.train.precision]
        side, flops = (8192, 2e13) if self.is_cuda else (512, 2e9)
        square = Product(SQUARE, side, side, side)
        try:
            for product in [square, *products(self.plan)]:
                kind = torch.bfloat16 if self.is_cuda and product is square else dtype
                fitting = product.within(self._room // kind.itemsize, flops)
                self._sizes[product.name] = f"{fitting.shape}, {'bf16' if kind == torch.bfloat16 else 'fp32'}"
                rate, checksum = product_rate(fitting, device, kind)
                self.report.tflops[product.name], self.report.checksums[product.name] = rate, checksum
            size = min(self._room // 2, (256 if self.is_cuda else 64) * 2**20)
            self.report.memory_gbps = copy_rate(device, size)
        except Exception as error:
            self.report.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def _write(self, token: str) -> None:
        if self.report.local_rank or self.report.storage_problem:
            return
        self._marker = self.folder / _file(token, self.report.node)
        try:
            self.report.storage_gbps = write_rate(self._marker)
        except OSError as error:
            self.report.storage_problem = f"cannot write in {self.folder.absolute()}: {error.strerror}; see runs_dir"

    def _look(self, token: str) -> None:
        """Check that this node sees what the others have written."""
        if self.report.local_rank or self.report.storage_problem:
            return
        wanted = {_file(token, node): node for node in range(self.topology.nodes)}
        deadline = time.monotonic() + VISIBLE_SECONDS
        while wanted and time.monotonic() < deadline:
            visible = {path.name for path in self.folder.glob(".preflight_*")}
            wanted = {name: node for name, node in wanted.items() if name not in visible}
            time.sleep(0.05 if wanted else 0)
        if wanted:
            self.report.storage_problem = (
                f"does not see in {self.folder.absolute()} what node {min(wanted.values())} has written there; "
                f"runs_dir must be on storage that all nodes share"
            )

    def _measure_links(self) -> None:
        per_node, device = self.topology.devices_per_node, self.rank.device
        node, place = divmod(self.rank.rank, per_node)
        inside = [None if other is None else node * per_node + other for other in _partners(rounds(per_node), place)]
        across = [
            None if other is None else other * per_node + place
            for other in _partners(rounds(self.topology.nodes), node)
        ]
        for partners in (inside, across):  # apart: the size that is sent follows the slowest link of the kind
            if partners:
                self.report.links += link_rates(partners, device, self._room // 2)

    def _measure_messages(self, groups: Groups) -> None:
        device, dtype = self.rank.device, DTYPES[self.config.train.precision]
        for message in messages(self.plan):
            if message.groups in ("across", "inside"):
                levels = groups.expert_group().levels
                assert levels is not None
                handle = levels[message.groups == "inside"].handle
            else:
                handle = groups.handle(message.groups)  # type: ignore[arg-type]
            assert handle is not None
            rate, size = collective_rate(message, handle, device, dtype, self._room // 2)
            part = "" if size >= message.bytes else f" of {_bytes(message.bytes)}"
            self._sizes[message.name] = f"{_bytes(size)}{part}, {message.size} ranks"
            self.report.collective_gbps[message.name] = rate


def _partners(turns: Sequence[Pairs], place: int) -> list[int | None]:
    """Whom `place` meets in each round; None where it sits out."""
    return [next((a + b - place for a, b in pairs if place in (a, b)), None) for pairs in turns]


def _nobody_has_problems(reports: Sequence[RankReport]) -> Answer:
    return {"go_on": not any(report.problem for report in reports)}


def _file(token: str, node: int) -> str:
    return f".preflight_{token}_{node}"


def _bytes(size: int) -> str:
    return f"{size / 2**20:,.3g} MiB" if size >= 2**20 else f"{size / 2**10:,.3g} KiB"


def versions(config: Config, device: torch.device) -> dict[str, str]:
    """Return what must be the same on all ranks: packages, the device's model and driver, and the config's text."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {package: package_version(package) or "not installed" for package in ("deepspeed", "dsmoe")}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["CUDA"] = torch.version.cuda or torch.version.hip or "none"
        found["driver"] = _driver()
    text = dump_config(config)
    return {**found, "config": f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"}


def steering(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how the ranks talk to each other."""
    return {key: value for key, value in worth_recording(environment).items() if key.startswith(_STEERING)}


def _driver() -> str:
    """The kernel driver's version, which containers share with their host."""
    found = re.search(r"\s(\d+\.\d+[.\d]*)\s", _DRIVER.read_text(encoding="utf-8")) if _DRIVER.exists() else None
    return found.group(1) if found else "unknown"
