"""`dsmoe checkpoint upcycle`: a dense model's weights as those of an MoE model that computes the same.

A feed-forward is a sum over its F inner channels. The first S go to the shared expert, if there is one, and the others
are cut into g slices as wide as an expert: g = 1 copies the feed-forward into every expert (Sparse Upcycling,
Komatsuzaki et al. 2022, arXiv 2212.05055), g > 1 makes granular experts. Expert e has slice e mod g, and the g experts
of a copy have the same row in the router, so that they are chosen together, as K is a multiple of g: the "virtual
groups" of He et al. 2024 (arXiv 2410.07524). A token's experts then add up to

    sum_copies w_copy * sum_slices f * slice(x) = f * (sum_copies w_copy) * FFN(x),    g * sum_copies w_copy = W,

where W is the sum of the token's K weights, and f the factor on every expert's `down`. (`down` alone, since the others
go through the activation.) f = g / W makes this the dense model. With normalised weights W is `moe.router.scale` for
every token, and the logits are equal to rounding. Without, W follows from the scores, and is K / E (softmax) or K / 2
(sigmoid) times the scale only where the router's logits are 0: the router's weights are drawn so small that they nearly
are.

Example: F = 6, no shared expert, experts of width 3: g = 2 slices, channels 0-2 and 3-5. With E = 4 and K = 2, experts
0 and 1 are the slices of copy 0, with the same row in the router, and experts 2 and 3 those of copy 1. A token of
copy 1 has w = 1/2 for each of experts 2 and 3, so that W = 1 and f = 2: 1/2 * 2 * slice 0 + 1/2 * 2 * slice 1 = FFN(x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dsmoe.checkpoint.compatibility import refuse, rows
from dsmoe.checkpoint.folder import inspect, verify
from dsmoe.checkpoint.inspection import one_checkpoint
from dsmoe.checkpoint.manifest import DamagedError
from dsmoe.checkpoint.state import BUFFER, MODEL
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Moe
from dsmoe.config.sections.model import DENSE_ACTIVATION
from dsmoe.interop.architectures import architecture_of
from dsmoe.interop.export import config_of
from dsmoe.interop.huggingface import folder_entries, folder_tensors, read_settings
from dsmoe.interop.importing import with_sections
from dsmoe.interop.logits import check_memory, compare, hf_logits, our_logits
from dsmoe.interop.model_files import whole_folder
from dsmoe.interop.names import BIAS, EXPERTS_DOWN, EXPERTS_GATE_UP, ROUTER, matches
from dsmoe.interop.sections import describe, sections_of
from dsmoe.interop.tensors import ChunkedTensor, LazyChunk, Tensors, checkpoint_tensors
from dsmoe.interop.weights import write_checkpoint
from dsmoe.launch.quoting import path_override
from dsmoe.moe.scores import SCORES
from dsmoe.parallel.random_weights import normal_from, seed_of
from dsmoe.parallel.sharding import Box
from dsmoe.plan.layers import dense_layers, is_moe_layer

SMALL_LOGITS = 0.01
"""Standard deviation of the router's first logits where these must nearly be 0."""


@dataclass(frozen=True)
class Dense:
    """A dense model."""

    config: Config
    """A run's config with the dense `model` section; other sections are right only where they describe the model."""
    tensors: Tensors
    logits: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Cut:
    """The division of a dense feed-forward's channels among experts; letters as in this module's docstring."""

    inner: int
    """F, the number of channels."""
    shared: int
    """S, the number of first channels, which go to the shared expert."""
    slices: int
    """g, the number of slices of the others."""
    factor: float
    """f, the factor on every expert's `down`."""
    router_std: float
    exact: bool
    """True if the logits are equal to rounding."""


def upcycle(
    source: Path, out: Path, config: Config, noise: float = 0.0, check: bool = True, say: Callable[[str], None] = print
) -> None:
    """Write the MoE model as the checkpoint `out` of step 0, which appears whole or not at all.

    One tensor is in memory at a time, but for the comparison of the logits.

    Args:
        source: a dense checkpoint of dsmoe's, or a Hugging Face folder.
        out: a folder that is not there yet.
        config: the run that is to begin with `out`.
        noise: added to every expert's weights from N(0, (noise * their root mean square)^2), after the comparison, so
            that the experts differ from the beginning.
        check: compare the logits with those of the dense model.
        say: called with each line of output.

    Raises:
        UserError: the config is of no MoE model that can compute the same, or the logits differ.
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
    """Return the dense model at `source`; `config` is of the run that is to begin with it.

    Raises:
        UserError: there is no dense model.
    """
    if (source / "config.json").is_file():
        settings = read_settings(source)
        architecture = architecture_of(settings)
        dense = with_sections(config, sections_of(settings))
        _check_dense(source, dense)
        tensors = folder_tensors(source, folder_entries(source), list(matches(dense, architecture.names)))
        return Dense(dense, tensors, partial(hf_logits, source, config))
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
    """Check that both configs describe the same model but for the feed-forwards."""
    saved, wanted = (
        {key: value for key, value in describe(one).items() if key.startswith("model.") and key != "model.ffn_size"}
        for one in (dense, config)
    )
    if dense_layers(config):
        saved["model.ffn_size"], wanted["model.ffn_size"] = dense.model.ffn_size, config.model.ffn_size
    refuse(source, "another model", rows(saved, wanted))


def cut_of(dense: Config, config: Config) -> Cut:
    """Divide the dense model's channels among the experts of `config`.

    Raises:
        UserError: no division makes the models compute the same; with the keys and the reasons.
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
    """Return the tensors of the MoE model, each made when it is read."""
    weights = {key: tensor for key, tensor in dense.tensors.items() if key.startswith(f"{MODEL}/")}
    for layer in range(config.model.num_layers):
        if is_moe_layer(config, layer):
            path = f"blocks.{layer}"
            gate_up = weights.pop(f"{MODEL}/{path}.ffn.gate_up.weight")
            down = weights.pop(f"{MODEL}/{path}.ffn.down.weight")
            weights |= _moe_layer(path, gate_up, down, config, cut, noise)
    return weights


def _moe_layer(
    path: str, gate_up: ChunkedTensor, down: ChunkedTensor, config: Config, cut: Cut, noise: float
) -> dict[str, ChunkedTensor]:
    """Return the tensors of one layer; experts are fp32, since they are multiplied by a factor and get noise."""
    moe, width = config.moe, config.model.hidden_size
    assert moe is not None
    experts, inner = moe.num_experts, moe.expert_ffn_size

    def stacked(
        name: str, shape: tuple[int, int], read: Callable[[int, int], torch.Tensor], factor: float
    ) -> ChunkedTensor:
        chunks = []
        for expert in range(experts):
            channels = partial(read, cut.shared + expert % cut.slices * inner, inner)
            seed = seed_of(config.train.seed, path, name, "upcycling", expert)
            chunks.append(LazyChunk(Box((expert, 0, 0), (1, *shape)), partial(_expert, channels, factor, noise, seed)))
        return ChunkedTensor(torch.float32, (experts, *shape), chunks)

    read_up, read_down = partial(_rows, gate_up, cut.inner), partial(_columns, down)
    found = {
        ROUTER: _whole(torch.float32, (experts, width), partial(_router, path, config, cut)),
        EXPERTS_GATE_UP: stacked(EXPERTS_GATE_UP, (2 * inner, width), read_up, 1.0),
        EXPERTS_DOWN: stacked(EXPERTS_DOWN, (width, inner), read_down, cut.factor),
    }
    if cut.shared:
        shared_up, shared_down = partial(read_up, 0, cut.shared), partial(read_down, 0, cut.shared)
        found["ffn.shared.gate_up.weight"] = _whole(gate_up.dtype, (2 * cut.shared, width), shared_up)
        found["ffn.shared.down.weight"] = _whole(down.dtype, (width, cut.shared), shared_down)
    tensors = {f"{MODEL}/{path}.{name}": tensor for name, tensor in found.items()}
    if moe.balance.bias_update_rate:  # a selection bias is part of the model, and begins at 0
        tensors[f"{BUFFER}/{path}.{BIAS}"] = _whole(torch.float32, (experts,), partial(torch.zeros, experts))
    return tensors


def _whole(dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], torch.Tensor]) -> ChunkedTensor:
    return ChunkedTensor(dtype, shape, [LazyChunk(Box.whole(shape), read)])


def _rows(gate_up: ChunkedTensor, all_channels: int, first: int, count: int) -> torch.Tensor:
    """Return channels of the gate, followed by the same channels of `up`."""
    width = gate_up.shape[1]
    return torch.cat([gate_up.read(Box((half + first, 0), (count, width))) for half in (0, all_channels)])


def _columns(down: ChunkedTensor, first: int, count: int) -> torch.Tensor:
    return down.read(Box((0, first), (down.shape[0], count)))


def _expert(channels: Callable[[], torch.Tensor], factor: float, noise: float, seed: int) -> torch.Tensor:
    weight = channels().float() * factor
    if noise:
        drawn = torch.empty_like(weight)
        normal_from(seed, drawn, noise * float(weight.square().mean().sqrt()))
        weight += drawn
    return weight


def _router(path: str, config: Config, cut: Cut) -> torch.Tensor:
    """Return the router's weight: a row for each copy, repeated for its slices."""
    assert config.moe is not None
    rows_CD = torch.empty(config.moe.num_experts // cut.slices, config.model.hidden_size)
    normal_from(seed_of(config.train.seed, f"{path}.ffn", "router"), rows_CD, cut.router_std)
    return rows_CD.repeat_interleave(cut.slices, dim=0)
