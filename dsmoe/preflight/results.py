"""Results of each rank, as plain numbers that travel as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SQUARE = "square"
"""The product that is compared with the data sheet: large, and the same for every config."""


@dataclass(frozen=True)
class Link:
    """An exchange between two devices, both sending at once."""

    peer: int
    gbps: float
    """GB/s that this rank has sent, one way."""
    us: float
    """Microseconds of an exchange of next to nothing."""


@dataclass
class RankReport:
    """One rank, and what it has measured so far."""

    rank: int
    node: int
    """Node of the rank by the topology."""
    local_rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    """Versions that must be the same on all ranks, by name."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that steer NCCL and gloo, and had better be the same."""
    clock: float = 0.0
    """Seconds since 1970, read when all ranks had met."""
    memory_total_gib: float | None = None
    memory_free_gib: float | None = None
    tflops: dict[str, float] = field(default_factory=dict)
    """TFLOP/s by product."""
    checksums: dict[str, float] = field(default_factory=dict)
    """Mean size of the numbers in each product, of equal factors on all ranks."""
    memory_gbps: float | None = None
    """GB/s that a copy on the device reads and writes."""
    storage_gbps: float | None = None
    """GB/s to the run folder, synced, while every node writes; of a node's first rank only."""
    links: list[Link] = field(default_factory=list)
    collective_gbps: dict[str, float] = field(default_factory=dict)
    """GB/s that the device sends during each message (nccl-tests' bus bandwidth)."""
    problem: str | None = None
    """Error that kept the rank from measuring."""
    storage_problem: str | None = None

    def json(self) -> dict[str, Any]:
        """The report as a mapping, for JSON; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> RankReport:
        """The report that `json` has made a mapping of."""
        return cls(**{**tree, "links": [Link(**link) for link in tree["links"]]})


@dataclass(frozen=True)
class Promise:
    """The YAML's `cluster` section on each device and link; None where it says nothing."""

    memory_gib: float | None = None
    peak_tflops: float | None = None
    intra_node_gbps: float | None = None
    inter_node_gbps: float | None = None
    intra_node_us: float | None = None
    inter_node_us: float | None = None
