"""The bytes that we count are the bytes that leave by the network interface."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.emulated_hosts import Cluster, missing
from tests.helpers.launching import ENVIRONMENT, PORT

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=f"no cluster here: {missing()}")]

WORKER = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
import dsmoe
from dsmoe.parallel import Groups
from dsmoe.runtime.processes import join_processes
from dsmoe.plan import Topology

def sent_bytes():
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:")]
    return int(line.split(":")[1].split()[8])

rank = join_processes("cpu")
torch.manual_seed(0)
groups = Groups(Topology(nodes=2, devices_per_node=1, expert=2))
factor = 1.25 if sys.argv[1] == "padded" else None
experts = dsmoe.Experts(expert_ffn_size=16)
layer = dsmoe.MoE(256, num_experts=8, ep_size=2, k=2, capacity_factor=factor, experts=experts)
layer.set_expert_group(groups.expert_group())
x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(rank.rank), requires_grad=True)
layer(x)[0].sum().backward()  # makes the connections, and the ranks agree
dist.barrier()
layer.take_traffic()
before = sent_bytes()
for _ in range(10):
    layer(x)[0].sum().backward()
dist.barrier()
print(json.dumps([*layer.take_traffic(), sent_bytes() - before]), flush=True)
"""


@pytest.mark.parametrize("way", ["padded", "variable"])
def test_counted_bytes_are_the_interfaces(way: str, tmp_path: Path) -> None:
    with Cluster(2) as cluster:
        joined = {**ENVIRONMENT, "MASTER_ADDR": cluster.hosts[0].address, "MASTER_PORT": PORT, "WORLD_SIZE": "2"}
        tasks = [
            host.start([sys.executable, "-c", WORKER, way], {**joined, "RANK": str(rank), "LOCAL_RANK": "0"}, tmp_path)
            for rank, host in enumerate(cluster)
        ]
        outcomes = [task.wait(120) for task in tasks]
    for outcome in outcomes:
        assert outcome.code == 0, outcome.output
        intra, inter, interface = json.loads(outcome.output.splitlines()[-1])
        assert intra == 0
        assert inter > 10_000_000
        assert 1.0 <= interface / inter < 1.04, (interface, inter)
