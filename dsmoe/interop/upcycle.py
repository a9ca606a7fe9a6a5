"""`dsmoe checkpoint upcycle`: a dense model's weights as the beginning of an MoE model that computes the same.

A feed-forward is a sum over its F inner channels. The first S go to the shared expert, if there is one, and the others
are cut into g slices as wide as an expert: g = 1 copies the feed-forward into every expert (Sparse Upcycling,
Komatsuzaki et al. 2022, arXiv 2212.05055), g > 1 makes granular experts. Expert e has slice e mod g, and the g experts
of a copy have the same row in the router, so that they are chosen together, as K is a multiple of g: the "virtual
groups" of He et al. 2024 (arXiv 2410.07524). A token's experts then add up to

    sum_copies w_copy * sum_slices f * slice(x) = f * (sum_copies w_copy) * FFN(x),    g * sum_copies w_copy = W,

with W what its K weights add up to, and f what we multiply every expert's `down` with. (`down` alone, since the others
go through the activation.) f = g / W makes it the dense model. With normalised weights W is `moe.router.scale` for
every token, and the logits are equal to rounding. Without, W follows from the scores, and is K / E (softmax) or K / 2
(sigmoid) times the scale only where the router's logits are 0: we draw its weights so small that they nearly are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dsmoe.checkpoint.fit import refuse, rows
from dsmoe.checkpoint.folder import inspect, verify
from dsmoe.checkpoint.inspection import one_checkpoint
from dsmoe.checkpoint.manifest import DamagedError
from dsmoe.checkpoint.state import BUFFER, MODEL
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Moe
from dsmoe.config.sections.model import DENSE_ACTIVATION
from dsmoe.interop.architectures import architecture_of
from dsmoe.interop.export import config_of
from dsmoe.interop.huggingface import folder_tensors, read_settings, read_slots
from dsmoe.interop.importing import with_sections
from dsmoe.interop.logits import check_memory, compare, our_logits, their_logits
from dsmoe.interop.model_files import whole_folder
from dsmoe.interop.names import BIAS, EXPERTS_DOWN, EXPERTS_GATE_UP, ROUTER, matches
from dsmoe.interop.sections import describe, sections_of
from dsmoe.interop.tensors import Tensors, Tile, Tiled, checkpoint_tensors
from dsmoe.interop.weights import write_checkpoint
from dsmoe.launch.quoting import path_override
from dsmoe.moe.scores import SCORES
from dsmoe.parallel.random_weights import normal_from, seed_of
from dsmoe.parallel.sharding import Box
from dsmoe.plan.layers import dense_layers, is_moe_layer

SMALL_LOGITS = 0.01
"""Standard deviation of the router's first logits where they must nearly be 0."""


@dataclass(frozen=True)
class Dense:
    """A dense model."""

    config: Config
    """A run's with its `model` section; only what describes the model is right in the others."""
    tensors: Tensors
    logits: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Cut:
    """How the channels of a dense feed-forward go to experts."""

    inner: int
    """F, all channels."""
    shared: int
    """S, the first ones, of the shared expert."""
    slices: int
    """g."""
    factor: float
    """f."""
    router_std: float
    exact: bool
    """Whether the logits are equal to rounding."""


def upcycle(
    source: Path, out: Path, config: Config, noise: float = 0.0, check: bool = True, say: Callable[[str], None] = print
) -> None:
    """Write the MoE model as the checkpoint `out` of step 0, which is there whole or not at all.

    One tensor is in memory at a time, but for the comparison of the logits.

    Args:
        source: a dense checkpoint of ours, or a Hugging Face folder.
        out: a folder that is not there yet.
        config: the run that is to begin with it.
        noise: added to every expert's weights from N(0, (noise * their root mean square)^2), after the comparison, so
            that the experts differ from the beginning.
        check: compare the logits with those of the dense model.
        say: what is told about it goes here.

    Raises:
        UserError: the config is not that of an MoE model which can compute the same, or the logits differ.
    """
    dense = read_dense(source, config)
    cut = cut_of(dense.config, config)
    _check_same(source, dense.config, config)
    if check:
        check_memory(config)
    with whole_folder(out) as partial_folder:
        origin = f"upcycled from {source.absolute()}, noise {noise:g}"
        write_checkpoint(partial_folder, config, upcycled(dense, config, cut, noise), origin)
        written = inspect(partial_folder)
        if check:
            quiet = upcycled(dense, config, cut) if noise else checkpoint_tensors(partial_folder, written)
            agreement = compare(our_logits(config, quiet), dense.logits())
            if cut.exact and not agreement.holds:
                raise UserError(f"the MoE model computes something else: {agreement}; {out} was not written")
            say(f"{'the same logits as' if cut.exact else 'near'} the dense model: {agreement}")
            if noise:
                say(f"this was before the noise of {noise:g}")
        else:
            say("not compared with the dense model (--no-check)")
    if not cut.exact:
        say("moe.router.normalize_weights is false: the weights of a token's experts add up to what is needed only")
        say("while the router's logits are near 0, so its weights are small; with true, the models would be equal")
    size = sum(file.bytes for file in written.files.values())
    say(f"wrote {out}: every expert is {_share(cut)}, {size / 1e9:.2f} GB")
    say(f"to begin a run with it: {path_override('checkpoint.weights_from', str(out))}")


def _share(cut: Cut) -> str:
    whole = "the dense feed-forward" if not cut.shared else "what the shared expert leaves of the dense feed-forward"
    return f"a copy of {whole}" if cut.slices == 1 else f"one of {cut.slices} slices of {whole}"


def read_dense(source: Path, config: Config) -> Dense:
    """The dense model at `source`; `config` is the run's that is to begin with it.

    Raises:
        UserError: there is none.
    """
    if (source / "config.json").is_file():
        settings = read_settings(source)
        architecture = architecture_of(settings)
        dense = with_sections(config, sections_of(settings))
        _check_dense(source, dense)
        tensors = folder_tensors(source, read_slots(source), list(matches(dense, architecture.names)))
        return Dense(dense, tensors, partial(their_logits, source, config))
    try:
        checkpoint = one_checkpoint(source)
    except DamagedError as error:
        raise UserError(f"{error}; nor is it a folder of Hugging Face's, with a config.json") from None
    manifest = verify(checkpoint)
    dense = config_of(checkpoint, manifest)
    _check_dense(source, dense)
    tensors = checkpoint_tensors(checkpoint, manifest)
    return Dense(dense, tensors, partial(our_logits, dense, tensors))


def _check_dense(source: Path, dense: Config) -> None:
    if len(dense_layers(dense)) < dense.model.num_layers:
        raise UserError(f"{source} is an MoE model already; only dense ones are upcycled")


def _check_same(source: Path, dense: Config, config: Config) -> None:
    """Check that outside of the feed-forwards both configs describe the same model."""
    there, here = (
        {key: value for key, value in describe(one).items() if key.startswith("model.") and key != "model.ffn_size"}
        for one in (dense, config)
    )
    if dense_layers(config):
        there["model.ffn_size"], here["model.ffn_size"] = dense.model.ffn_size, config.model.ffn_size
    refuse(source, "another model", rows(there, here))


def cut_of(dense: Config, config: Config) -> Cut:
    """How the dense model's channels go to the experts of `config`.

    Raises:
        UserError: they cannot so that the models compute the same; with the keys and the reasons.
    """
    moe, inner = config.moe, dense.model.ffn_size
    assert inner is not None, "a dense model has a width"
    if moe is None or len(dense_layers(config)) == config.model.num_layers:
        raise UserError("the config has no MoE layers to upcycle to; give it a `moe` section")
    shared = moe.shared_expert_ffn_size or 0
    problems = list(_obstacles(moe, inner, shared))
    if problems:
        raise UserError("\n  ".join(["the MoE model would not compute what the dense one does:", *problems]))
    slices = (inner - shared) // moe.expert_ffn_size
    exact, std = moe.router.normalize_weights, config.model.init_std
    total = moe.router.scale
    if not exact:
        even_E = SCORES[moe.router.score].of_logits(torch.zeros(moe.num_experts, dtype=torch.float64))
        total *= moe.top_k * float(even_E[0])
        std = min(std, SMALL_LOGITS / math.sqrt(config.model.hidden_size))
    return Cut(inner, shared, slices, slices / total, std, exact)


def _obstacles(moe: Moe, inner: int, shared: int) -> Iterator[str]:
    required = {
        "moe.activation": (moe.activation, DENSE_ACTIVATION, "it is that of the dense feed-forward"),
        "moe.residual": (moe.residual, False, "its experts and its MLP are mixed by other coefficients for each token"),
        "moe.router.choice": (moe.router.choice, "token", "a token has no fixed number of experts otherwise"),
        "moe.router.force_balanced": (moe.router.force_balanced, False, "slices are chosen together by their scores"),
    }
    for key, (value, wanted, reason) in required.items():
        if value != wanted:
            yield f"{key} ({str(value).lower()}) must be {str(wanted).lower()}: {reason}"
    width = moe.expert_ffn_size
    if shared >= inner or (inner - shared) % width:
        rest = f" less moe.shared_expert_ffn_size ({shared})" if shared else ""
        yield f"moe.expert_ffn_size ({width}) must divide the dense model's ffn_size ({inner}){rest}"
        return
    slices = (inner - shared) // width
    sizes = {
        "moe.num_experts": (moe.num_experts, "every slice is in as many experts"),
        "moe.top_k": (moe.top_k, "a token needs every slice equally often"),
        "moe.num_experts / moe.router.num_groups": (
            moe.num_experts // moe.router.num_groups,
            "all slices of a copy stand in one group",
        ),
    }
    for key, (size, reason) in sizes.items():
        if size % slices:
            yield f"{key} ({size}) must be a multiple of {slices}, the slices of the feed-forward: {reason}"


def upcycled(dense: Dense, config: Config, cut: Cut, noise: float = 0.0) -> Tensors:
    """The tensors of the MoE model, each made when it is read."""
    weights = {key: tensor for key, tensor in dense.tensors.items() if key.startswith(f"{MODEL}/")}
    for layer in range(config.model.num_layers):
        if is_moe_layer(config, layer):
            path = f"blocks.{layer}"
            gate_up = weights.pop(f"{MODEL}/{path}.ffn.gate_up.weight")
            down = weights.pop(f"{MODEL}/{path}.ffn.down.weight")
            weights |= _moe_layer(path, gate_up, down, config, cut, noise)
    return weights


def _moe_layer(path: str, gate_up: Tiled, down: Tiled, config: Config, cut: Cut, noise: float) -> dict[str, Tiled]:
    """The tensors of one layer; experts are fp32, for what they are multiplied with and added to."""
    moe, width = config.moe, config.model.hidden_size
    assert moe is not None
    experts, inner = moe.num_experts, moe.expert_ffn_size

    def stacked(name: str, shape: tuple[int, int], read: Callable[[int, int], torch.Tensor], factor: float) -> Tiled:
        tiles = []
        for expert in range(experts):
            channels = partial(read, cut.shared + expert % cut.slices * inner, inner)
            seed = seed_of(config.train.seed, path, name, "upcycling", expert)
            tiles.append(Tile(Box((expert, 0, 0), (1, *shape)), partial(_expert, channels, factor, noise, seed)))
        return Tiled(torch.float32, (experts, *shape), tiles)

    read_up, read_down = partial(_rows, gate_up, cut.inner), partial(_columns, down)
    found = {
        ROUTER: _whole(torch.float32, (experts, width), partial(_router, path, config, cut)),
        EXPERTS_GATE_UP: stacked(EXPERTS_GATE_UP, (2 * inner, width), read_up, 1.0),
        EXPERTS_DOWN: stacked(EXPERTS_DOWN, (width, inner), read_down, cut.factor),
    }
    if cut.shared:
        up, away = partial(read_up, 0, cut.shared), partial(read_down, 0, cut.shared)
        found["ffn.shared.gate_up.weight"] = _whole(gate_up.dtype, (2 * cut.shared, width), up)
        found["ffn.shared.down.weight"] = _whole(down.dtype, (width, cut.shared), away)
    tensors = {f"{MODEL}/{path}.{name}": tensor for name, tensor in found.items()}
    if moe.balance.bias_update_rate:  # a selection bias is part of the model, and begins at 0
        tensors[f"{BUFFER}/{path}.{BIAS}"] = _whole(torch.float32, (experts,), partial(torch.zeros, experts))
    return tensors


def _whole(dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], torch.Tensor]) -> Tiled:
    return Tiled(dtype, shape, [Tile(Box.all_of(shape), read)])


def _rows(gate_up: Tiled, all_channels: int, first: int, count: int) -> torch.Tensor:
    """Channels of the gate, and then the same of the other half."""
    width = gate_up.shape[1]
    return torch.cat([gate_up.read(Box((half + first, 0), (count, width))) for half in (0, all_channels)])


def _columns(down: Tiled, first: int, count: int) -> torch.Tensor:
    return down.read(Box((0, first), (down.shape[0], count)))


def _expert(channels: Callable[[], torch.Tensor], factor: float, noise: float, seed: int) -> torch.Tensor:
    weight = channels().float() * factor
    if noise:
        drawn = torch.empty_like(weight)
        normal_from(seed, drawn, noise * float(weight.square().mean().sqrt()))
        weight += drawn
    return weight


def _router(path: str, config: Config, cut: Cut) -> torch.Tensor:
    """A row for each copy, which its slices share."""
    assert config.moe is not None
    rows_CD = torch.empty(config.moe.num_experts // cut.slices, config.model.hidden_size)
    normal_from(seed_of(config.train.seed, f"{path}.ffn", "router"), rows_CD, cut.router_std)
    return rows_CD.repeat_interleave(cut.slices, dim=0)
