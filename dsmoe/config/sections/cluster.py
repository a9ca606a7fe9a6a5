"""The section `cluster`: the machines."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from dsmoe.config.sections.base import NoEffect, PositiveFloat, Section, Text, Timeout, whole_number


class Device(Section):
    """An accelerator that is not in `dsmoe.plan.devices`, described by its data sheet."""

    memory_gib: NoEffect[PositiveFloat]
    """Usable device memory in GiB."""
    peak_tflops: NoEffect[PositiveFloat]
    """Dense bf16 matrix rate in TFLOP/s, without sparsity; the denominator of MFU."""


class Cluster(Section):
    """The machines: their number, devices, names and network."""

    nodes: NoEffect[Annotated[int, Field(ge=1, le=100_000), BeforeValidator(whole_number)]] = 1
    """Machines."""
    devices_per_node: NoEffect[Annotated[int, Field(ge=1, le=1_024), BeforeValidator(whole_number)]] = 1
    """Devices in each machine; one process drives one device."""
    device: NoEffect[Text | Device | None] = None
    """A name known to `dsmoe.plan.devices` (`cpu` trains over gloo), a description, or null: any CUDA device, without
    MFU."""
    interface: NoEffect[Text | None] = None
    """The network interface between nodes (`eth0`, `ib0`), as `ip address` lists it on every one of them; null leaves
    the choice to NCCL and gloo, which sometimes choose wrongly among several."""
    hosts: NoEffect[Text | None] = None
    """The nodes' names, rank 0's first, for `dsmoe launch --hostfile`: `node[01-08]`, or `alpha,beta`."""
    hostfile: NoEffect[Text | None] = None
    """Instead of `hosts`: a file that has them already, with `NAME slots=DEVICES` on each line."""
    elastic: NoEffect[bool] = False
    """Train on whatever devices the launcher has started: `parallel.expert` and the micro-batch follow, the batch
    stays. Else a world of another size is refused."""
    collective_timeout_seconds: NoEffect[Timeout] = 1800
    """Seconds that a collective may wait, in every process group, before the run is stopped."""
    intra_node_gbps: NoEffect[PositiveFloat | None] = None
    """Bandwidth from a device to another of its node, in GB/s one way; null promises nothing. `dsmoe preflight`
    measures it."""
    inter_node_gbps: NoEffect[PositiveFloat | None] = None
    """Bandwidth from a device to another node while all devices of its node send, in GB/s one way."""
    intra_node_us: NoEffect[PositiveFloat | None] = None
    """Latency of an almost empty exchange inside a node, in microseconds."""
    inter_node_us: NoEffect[PositiveFloat | None] = None
    """Latency of an almost empty exchange between nodes, in microseconds."""
