"""Forward and forward + backward of one MoE layer, every peer in one process, interleaved; medians and ratios.

    python -m benchmarks.moe_layer --shapes A B --dtypes bf16 fp32 --routing balanced zipf --repeats 9

The ratio to the dense floor and to peers is what counts: absolute times on a shared machine mean little. Writes
`benchmarks/results/moe_layer_DEVICE.json` with hardware, versions and the command.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch

from benchmarks.measuring import DTYPES, seconds, write
from benchmarks.peers import PEERS, SHAPES, Peer, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "B"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--routing", nargs="+", default=["balanced", "zipf"], choices=["balanced", "zipf"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for shape in (SHAPES[name] for name in options.shapes):
        for dtype in options.dtypes:
            for routing in options.routing:
                rows += measure(shape, dtype, routing, options)
    write(f"moe_layer_{options.device}", rows, options.device, options.threads)


def measure(shape: Shape, dtype: str, routing: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every peer on one shape: time round robin, so that a busy moment hits all alike."""
    x_TD, router_ED, grad_TD = inputs(shape, DTYPES[dtype], routing, options.device)
    layers: dict[str, Peer] = {}
    for name in options.peers:
        try:
            layers[name] = Peer(name, shape, router_ED)
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    saved = {name: saved_bytes(layer, x_TD) for name, layer in layers.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "training": []} for name in layers}
    for repeat in range(options.repeats + 1):
        for name, layer in layers.items():
            forward = seconds(lambda layer=layer: layer.forward(x_TD), options.device)
            training = seconds(lambda layer=layer: layer.train(x_TD, grad_TD), options.device)
            layer.clear(x_TD)
            if repeat:  # the first round warms up
                times[name]["forward"].append(forward)
                times[name]["training"].append(training)
    rows = []
    floor = times.get("dense floor", next(iter(times.values())))
    print(
        f"\n{shape.name}: {shape.hidden} x {shape.ffn}, {shape.experts} experts top {shape.top_k}, {dtype}, {routing}"
    )
    print(f"{'':<34}{'forward ms':>12}{'ratio':>8}{'training ms':>13}{'ratio':>8}{'TFLOP/s':>9}{'saved KiB/token':>17}")
    for name, taken in times.items():
        row = summarise(shape, taken, floor, saved[name])
        print(
            f"{name:<34}{row['forward_ms']:>12.1f}{row['forward_ratio']:>8.2f}{row['training_ms']:>13.1f}"
            f"{row['training_ratio']:>8.2f}{row['training_tflops']:>9.2f}{row['saved_kib_per_token']:>17.1f}"
        )
        rows.append({"shape": shape.name, "dtype": dtype, "routing": routing, "peer": name, **row})
    return rows


def summarise(
    shape: Shape, taken: dict[str, list[float]], floor: dict[str, list[float]], saved: int
) -> dict[str, float]:
    """Medians, and the median over rounds of the ratio to the floor in the same round."""
    result: dict[str, float] = {}
    for kind in ("forward", "training"):
        result[f"{kind}_ms"] = statistics.median(taken[kind]) * 1e3
        result[f"{kind}_ratio"] = statistics.median(a / b for a, b in zip(taken[kind], floor[kind], strict=True))
    result["training_tflops"] = shape.training_flops / statistics.median(taken["training"]) / 1e12
    result["saved_kib_per_token"] = saved / shape.tokens / 1024
    return result


def inputs(
    shape: Shape, dtype: torch.dtype, routing: str, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, router weight, output gradient. Zipf: through a constant feature, expert e's logit loses log(e + 1)."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x_TD, router_ED = normal(shape.tokens, shape.hidden), normal(shape.experts, shape.hidden) * shape.hidden**-0.5
    x_TD[:, 0] = 1.0
    ranks_E = torch.arange(1, shape.experts + 1, device=device).float()
    router_ED[:, 0] = -ranks_E.log() if routing == "zipf" else 0.0
    return x_TD.to(dtype).requires_grad_(), router_ED.to(dtype), normal(shape.tokens, shape.hidden).to(dtype)


def saved_bytes(peer: Peer, x_TD: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out; the input counts."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in peer.layer.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        peer.forward(x_TD)
    return sum(storages.values())


if __name__ == "__main__":
    main()
