"""One MoE layer over hosts with a slow link between them: seconds and bytes of flat and hierarchical exchanges.

    python -m benchmarks.all_to_all --hosts 2 4 --ranks-per-host 2 --rate 100mbit --repeats 7

The hosts are network namespaces of this machine (`tests.helpers.emulated_hosts`: root, iproute2, openssh, pdsh), the
link is shaped by `tc`. Every exchange is timed in turn in the same processes, forward and backward, from a barrier to
the end of the slowest rank; medians. Bytes are what `MoE.take_traffic` counts between hosts in one pass, over all
ranks, and what the hosts' interfaces have sent, packet headers included. Writes `benchmarks/results/all_to_all.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from math import comb
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dsmoe
from benchmarks.measuring import write
from dsmoe.parallel import Groups
from dsmoe.plan import Topology
from dsmoe.runtime.processes import join_processes
from tests.helpers.emulated_hosts import CABLE, Cluster, missing
from tests.helpers.launching import ENVIRONMENT, PORT, REPOSITORY

EXPERTS, TOP_K = 32, 8
EXCHANGES = [(way, chunks) for way in ("flat", "hierarchical") for chunks in (1, 2, 4)]
SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--ranks-per-host", type=int, default=2)
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--worker", type=int, metavar="HOSTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if reason := missing():
        sys.exit(f"no hosts can be made here: {reason}")
    write("all_to_all", [row for hosts in options.hosts for row in measure(hosts, options)], "cpu", 1)


def measure(num_hosts: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All exchanges over `num_hosts` hosts."""
    ranks = options.ranks_per_host
    command = [sys.executable, "-m", "benchmarks.all_to_all", *sys.argv[1:], "--worker", str(num_hosts)]
    with tempfile.TemporaryDirectory() as folder, Cluster(num_hosts) as cluster:
        joined = {**ENVIRONMENT, "MASTER_ADDR": cluster.hosts[0].address, "MASTER_PORT": PORT, "RESULTS": folder}
        joined |= {"WORLD_SIZE": str(num_hosts * ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        for host in cluster:
            host.shape(options.rate)
        tasks = [
            host.start(command, {**joined, "RANK": str(number * ranks + local), "LOCAL_RANK": str(local)}, REPOSITORY)
            for number, host in enumerate(cluster)
            for local in range(ranks)
        ]
        for task in tasks:
            outcome = task.wait(SECONDS)
            if outcome.code:
                sys.exit(outcome.output)
        by_rank = [
            json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(len(tasks))
        ]
    rows = [summarise(num_hosts, options, *exchange) for exchange in zip(EXCHANGES, zip(*by_rank))]  # noqa: B905
    for row in rows:
        row["seconds_over_flat"] = row["seconds"] / rows[0]["seconds"]
        row["bytes_over_flat"] = row["inter_bytes"] / rows[0]["inter_bytes"]
        print(json.dumps(row), flush=True)
    return rows


def summarise(
    num_hosts: int, options: argparse.Namespace, exchange: tuple[str, int], by_rank: tuple[dict[str, Any], ...]
) -> dict[str, Any]:
    """The slowest rank of each round, the bytes of all ranks, and how many rows a token should take."""
    way, chunks = exchange
    visited = num_hosts * (1 - comb(EXPERTS - EXPERTS // num_hosts, TOP_K) / comb(EXPERTS, TOP_K))
    others = (num_hosts - 1) / num_hosts
    first_of_hosts = by_rank[:: options.ranks_per_host]
    return {
        "hosts": num_hosts,
        "ranks_per_host": options.ranks_per_host,
        "rate": options.rate,
        "exchange": way,
        "overlap_chunks": chunks,
        "seconds": statistics.median(map(max, zip(*(rank["seconds"] for rank in by_rank), strict=True))),
        "inter_bytes": sum(rank["inter_bytes"] for rank in by_rank),
        "interface_bytes": sum(rank["interface_bytes"] for rank in first_of_hosts),
        "expected_rows_per_token": (visited if way == "hierarchical" else TOP_K) * others,
    }


def work(options: argparse.Namespace) -> None:
    """One rank: every exchange in turn, `repeats` times after a first that is not counted."""
    rank = join_processes("cpu")
    torch.manual_seed(rank.rank)
    x_TD = torch.randn(options.tokens, options.hidden, dtype=torch.bfloat16, requires_grad=True)
    layers = []
    for way, chunks in EXCHANGES:
        topology = Topology(options.worker, options.ranks_per_host, expert=rank.world_size, all_to_all=way)
        layer = dsmoe.MoE(
            options.hidden,
            num_experts=EXPERTS,
            ep_size=rank.world_size,
            k=TOP_K,
            drop_tokens=False,
            experts=dsmoe.Experts(expert_ffn_size=options.ffn),
            layout=dsmoe.Layout(overlap_chunks=chunks),
            seed=0,
        )
        torch.nn.init.normal_(layer.router.weight, generator=torch.Generator().manual_seed(0))
        layer.to(torch.bfloat16).set_expert_group(Groups(topology).expert_group())
        layers.append(layer)
    results: list[dict[str, Any]] = [{"seconds": []} for _ in layers]
    for repeat in range(options.repeats + 1):
        for layer, result in zip(layers, results, strict=True):
            layer.take_traffic()
            dist.barrier()
            sent, begun = interface_bytes(), time.perf_counter()
            output, _, _ = layer(x_TD)
            output.sum().backward()
            seconds = time.perf_counter() - begun
            dist.barrier()
            result["inter_bytes"] = layer.take_traffic()[1]
            result["interface_bytes"] = interface_bytes() - sent
            if repeat:
                result["seconds"].append(seconds)
    (Path(os.environ["RESULTS"]) / f"{rank.rank}.json").write_text(json.dumps(results), encoding="utf-8")


def interface_bytes() -> int:
    """Bytes that this host has sent by its cable; the ninth number of its line."""
    (line,) = [
        line
        for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(CABLE)
    ]
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
