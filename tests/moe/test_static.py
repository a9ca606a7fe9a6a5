"""With static shapes the step reads nothing on the host, can be captured, and compiles to one graph.

On a GPU, `torch.cuda.set_sync_debug_mode("error")` and a CUDA graph say so, in bf16, the dtype of which torch's grouped
product reads nothing on the host. On a CPU, every way that leads from a tensor's values to the host or to another
tensor's shape is closed while the layer runs, and what is captured are its operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from shutil import which
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dsmoe
from dsmoe.moe import grouped_ffn
from dsmoe.parallel import Groups
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer
from tests.moe import DEVICE

D, E, T = 16, 4, 12
needs_grouped_kernel = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0),
    reason="below compute capability 9.0 torch's grouped product reads where its groups end on the host",
)
DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostReadError(Exception):
    """A tensor's values were asked for."""


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        depends = DEPENDS_ON_VALUES & set(func.tags)
        if func is torch.ops.aten.index.Tensor:  # only a mask's shape is unknown
            depends = any(index is not None and index.dtype == torch.bool for index in args[1])
        if func is torch.ops.aten.repeat_interleave.Tensor:
            depends = (kwargs or {}).get("output_size") is None
        if depends:
            raise HostReadError(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(device: str = "cpu") -> Iterator[None]:
    """As on a GPU: experts in groups, not one by one as the CPU does; `tolist` alone needs no operator on a CPU."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def tolist(tensor: torch.Tensor) -> Any:
        raise HostReadError("tolist")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_ffn, "_Looped", grouped_ffn._Grouped)
        patch.setattr(torch.Tensor, "tolist", tolist)
        with _NoHostReads():
            yield


def train_once(layer: dsmoe.MoE, used: torch.Tensor | None = None) -> None:
    weight = layer.experts.down
    x = torch.randn(T, D, device=weight.device, dtype=weight.dtype, requires_grad=True)
    output, _, _ = layer(x, used)
    output.sum().backward()


def make_layer(ep_size: int = 1, **options: Any) -> dsmoe.MoE:
    return moe_layer(D, num_experts=E, ep_size=ep_size, k=2, expert_ffn_size=8, seed=0, **options)


ONE_RANK = [
    {"capacity_factor": None},
    {"capacity_factor": 1.0, "drop_policy": "probability", "recompute_experts": True},
    {"capacity_factor": 0.5, "drop_policy": "position", "renormalize_dropped": True},
    {"capacity_factor": 1.0, "choice": "expert", "shared_expert_ffn_size": 8},
    {"capacity_factor": None, "aux_loss": 0.1, "z_loss": 0.1, "scope": "sequence", "bias_update_rate": 0.1},
    {"capacity_factor": 1.0, "aux_loss": 0.1, "scope": "global", "score": "sigmoid", "num_groups": 2},
]
RANDOM = [
    {"capacity_factor": 1.0, "drop_policy": "random"},
    {"capacity_factor": None, "noise": "gumbel"},
    {"capacity_factor": None, "noise": "jitter"},
]


@needs_grouped_kernel
@pytest.mark.parametrize("options", ONE_RANK + RANDOM, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_one_rank_reads_nothing_on_the_host(options: dict[str, Any], masked: bool) -> None:
    layer = make_layer(**options).to(DEVICE, torch.bfloat16)
    used = torch.arange(T, device=DEVICE) % 3 != 1 if masked else None
    train_once(layer, used)  # compiles the kernels
    with no_host_reads(DEVICE):
        layer.begin_step(1)
        train_once(layer, used)
        dsmoe.moe.update_routers([layer])


def host_reads_over_ranks() -> dict[str, bool]:
    """Whether each way to exchange tokens reads something on the host."""
    groups = Groups(Topology(1, dist.get_world_size(), expert=dist.get_world_size()))
    ways = {
        "padded to a known size": {"capacity_factor": 1.0, "max_tokens": T},
        "padded to a known size, in chunks": {"capacity_factor": 1.0, "max_tokens": T, "overlap_chunks": 2},
        "padded to what the ranks agree on": {"capacity_factor": 1.0},
        "dropless": {"capacity_factor": None},
    }
    reads = {}
    for way, options in ways.items():
        layer = make_layer(groups.topology.expert, **options)
        layer.set_expert_group(groups.expert_group())
        try:
            with no_host_reads():
                train_once(layer)
            reads[way] = False
        except HostReadError:
            reads[way] = True
    return reads


def test_over_ranks_only_padding_to_a_known_size_reads_nothing() -> None:
    expected = {
        "padded to a known size": False,
        "padded to a known size, in chunks": False,
        "padded to what the ranks agree on": True,
        "dropless": True,
    }
    assert run_ranks(2, host_reads_over_ranks) == [expected] * 2


Results = list[torch.Tensor]


def capture(step: Callable[[torch.Tensor], Results], x: torch.Tensor) -> Callable[[torch.Tensor], Results]:
    """`step` as what it has done with `x` once: nothing else can be done with another input."""
    if x.device.type == "cpu":
        return torch.no_grad()(make_fx(step)(x))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x)

    def replay(other: torch.Tensor) -> Results:
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        return results

    return replay


@needs_grouped_kernel
@pytest.mark.parametrize("options", ONE_RANK, ids=str)
def test_a_captured_pass_serves_any_other_input(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_ffn, "_Looped", grouped_ffn._Grouped)
    layer = make_layer(**options).to(DEVICE, torch.bfloat16)
    with torch.no_grad():  # so that other tokens choose other experts, in other numbers
        layer.router.weight.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    parameters = list(layer.parameters())

    def step(x: torch.Tensor) -> Results:
        output, _, counts = layer(x)
        return [output, counts, *torch.autograd.grad(output.square().sum(), [x, *parameters])]

    def tokens(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, T // 2, D, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()

    captured = capture(step, tokens(1))
    seen = set()
    for seed in (2, 3, 4):
        got, expected = [result.clone() for result in captured(tokens(seed))], step(tokens(seed))
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        seen.add(tuple(expected[1].tolist()))
    assert len(seen) > 1 or options.get("choice") == "expert", "the inputs are routed alike: nothing is proved"


BACKENDS = [(options, "aot_eager") for options in ONE_RANK]
if DEVICE == "cuda" and which("cc"):  # the code that Inductor makes is loaded by a module of C
    BACKENDS += [(options, "inductor") for options in ONE_RANK[:2]]


@pytest.mark.parametrize(("options", "backend"), BACKENDS, ids=str)
def test_the_layer_compiles_to_one_graph_with_the_same_numbers(
    options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_ffn, "_Looped", grouped_ffn._Grouped)
    layer = make_layer(**options).to(DEVICE, torch.bfloat16)  # torch compiles grouped products in bf16 only
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for run in (layer, compiled):
        torch.manual_seed(1)
        x = torch.randn(2, T // 2, D).to(DEVICE, torch.bfloat16).requires_grad_()
        layer.zero_grad()
        output, aux_loss, counts = run(x)
        (output.square().sum() + 0.0 * aux_loss).backward()
        results.append([output, aux_loss, counts, x.grad, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("loss", ["aux_loss", "z_loss"])
def test_attached_losses_flow_through_a_compiled_layer(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a graph ends behind the experts, as it does on a CPU: what follows was seen as a mere view there."""
    monkeypatch.setattr(grouped_ffn, "_Looped", grouped_ffn._Grouped)
    torch._dynamo.reset()
    x = torch.randn(2, T // 2, D).to(DEVICE, torch.bfloat16)
    gradients = []
    for compiled in (False, True):
        layer = make_layer(capacity_factor=None, **{loss: 10.0}).to(DEVICE, torch.bfloat16)
        torch.nn.init.normal_(layer.router.weight, generator=torch.Generator(DEVICE).manual_seed(0))
        layer.experts.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        run = torch.compile(layer, dynamic=False, backend="aot_eager") if compiled else layer
        (0.0 * run(x)[0]).sum().backward()
        gradients.append(layer.router.weight.grad)
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[1], gradients[0])
