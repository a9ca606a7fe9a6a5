"""An entry of the registry: one Hugging Face architecture, for export and import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsmoe.config.schema import Config
from dsmoe.config.sections.model import DENSE_ACTIVATION
from dsmoe.config.yaml_text import show_value
from dsmoe.interop.architectures.parts import HIDDEN_ACT, Need, Settings
from dsmoe.interop.names import Names
from dsmoe.plan.layers import dense_layers, head_dim, num_kv_heads

_QK_NORM_NEEDS = {
    True: (Need("model.qk_norm", (True,), "its attention norms queries and keys"),),
    False: (Need("model.qk_norm", (False,), "its attention norms neither queries nor keys"),),
    None: (),
}


@dataclass(frozen=True)
class Experts:
    """The MoE layers of an architecture, as its config describes them."""

    layers: Callable[[Settings], list[int]]
    """Returns the indices of the MoE layers."""
    section: Callable[[Settings], dict[str, Any]]
    """Returns dsmoe's `moe` section."""


@dataclass(frozen=True)
class Refused:
    """An architecture that people ask for and that dsmoe's options cannot be written as."""

    name: str
    why_not_read: str
    why_not_written: str | None = None
    """None where the message is that there is no such format."""


def _none(_: object) -> Iterator[str]:
    return iter(())


@dataclass(frozen=True, eq=False)  # an entry is equal to itself alone, so that it can be a cache's key
class Architecture:
    """A Hugging Face architecture.

    Attributes:
        name: its `model_type`.
        class_name: of its causal language model.
        settings: returns the keys of its config that not every config has.
        names: its names for the parts of an MoE layer.
        keys: the types of the keys that its config must have, besides those that every config has.
        optional_keys: the types of other keys that are read.
        qk_norm: True if its attention norms queries and keys; None where its config decides (`use_qk_norm`).
        needs: the values that dsmoe's options must have, besides `model.qk_norm`.
        misfits: yields sentences on other options of dsmoe's that it cannot express.
        settings_misfits: yields sentences on what its config asks for and dsmoe's model cannot do, besides what any
            config may ask for.
        experts: its MoE layers; None where all of its layers are dense.
    """

    name: str
    class_name: str
    settings: Callable[[Config], dict[str, Any]]
    names: Names = field(default_factory=Names)
    keys: Mapping[str, Any] = field(default_factory=dict)
    optional_keys: Mapping[str, Any] = field(default_factory=dict)
    qk_norm: bool | None = False
    needs: tuple[Need, ...] = ()
    misfits: Callable[[Config], Iterator[str]] = _none
    settings_misfits: Callable[[Settings], Iterator[str]] = _none
    experts: Experts | None = None

    def refusals(self, config: Config) -> list[str]:
        """Return why the model of `config` cannot be one of these: each reason with key, value and what is needed."""
        unmet = []
        for need in (*self.needs, *_QK_NORM_NEEDS[self.qk_norm]):
            value = _value(config, need.key)
            if value not in need.allowed and not (config.moe is None and need.key.startswith("moe.")):
                allowed = " or ".join(map(show_value, need.allowed))
                unmet.append(f"{need.key} ({show_value(value)}) must be {allowed}: {need.reason}")
        return [*unmet, *self._expert_misfits(config), *self.misfits(config)]

    def _expert_misfits(self, config: Config) -> Iterator[str]:
        dense = dense_layers(config)
        if self.experts is None:
            if len(dense) < config.model.num_layers:
                yield "moe must be null: it has no experts"
        elif len(dense) == config.model.num_layers:
            yield "moe (null) must be there: it has experts"
        elif config.moe is not None and dense and config.moe.activation != DENSE_ACTIVATION:
            yield (
                f"moe.activation ({config.moe.activation}) must be {DENSE_ACTIVATION} where there are dense layers "
                f"({', '.join(map(str, dense))}): those are SwiGLU, and it has one activation for both"
            )

    def export(self, config: Config) -> dict[str, Any]:
        """Return its config for a model that it can express; transformers before and from 5 find the rotary base."""
        model, activation = config.model, DENSE_ACTIVATION
        if config.moe is not None and len(dense_layers(config)) < model.num_layers:
            activation = config.moe.activation
        return {
            "architectures": [self.class_name],
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": num_kv_heads(model),
            "head_dim": head_dim(model),
            "hidden_act": HIDDEN_ACT[activation],
            "max_position_embeddings": model.max_sequence_length,
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
            "tie_word_embeddings": model.tie_embeddings,
            "initializer_range": model.init_std,
            "attention_bias": False,
            **self.settings(config),
        }

    def settings_refusals(self, settings: Settings) -> list[str]:
        """Return why dsmoe's model cannot be that of `settings`: each reason with key, value and what is needed."""
        return [*self._common_misfits(settings), *self.settings_misfits(settings)]

    def _common_misfits(self, settings: Settings) -> Iterator[str]:
        for key in ("attention_bias", "mlp_bias"):
            if settings.get(key):
                yield f"{key} (true) must be false: our projections have no biases"
        rotary = _rotary(settings)
        kind, part = rotary.get("rope_type", "default"), rotary.get("partial_rotary_factor") or 1.0
        if kind != "default":
            yield f"rope_parameters.rope_type ({kind}) must be default: our rotary frequencies are not scaled"
        if part != 1.0:
            yield f"rope_parameters.partial_rotary_factor ({part}) must be 1: we rotate all of a head's vector"
        if "full_attention" not in (settings.get("layer_types") or ["full_attention"]):
            yield "layer_types must have full_attention"
        sparse, layers = self._moe_layers(settings), settings["num_hidden_layers"]
        allowed = tuple(HIDDEN_ACT.values()) if len(sparse) == layers else (HIDDEN_ACT[DENSE_ACTIVATION],)
        if settings["hidden_act"] not in allowed:
            yield f"hidden_act ({settings['hidden_act']}) must be {' or '.join(allowed)}"
        if sparse and _pattern(sparse, layers) is None:
            yield f"its MoE layers ({', '.join(map(str, sparse))}) must be every n-th one after some dense ones"

    def sections(self, settings: Settings) -> dict[str, Any]:
        """Return the `model` and `moe` sections of a model without `settings_refusals`; defaults are left out."""
        sparse = self._moe_layers(settings)
        model: dict[str, Any] = {
            "vocab_size": settings["vocab_size"],
            "hidden_size": settings["hidden_size"],
            "num_layers": settings["num_hidden_layers"],
            "num_heads": settings["num_attention_heads"],
            "num_kv_heads": settings["num_key_value_heads"],
            "head_dim": settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"],
        }
        if sparse:
            first, every = _pattern(sparse, settings["num_hidden_layers"])
            model |= {"dense_layers": first, "moe_every": every}
        if len(sparse) < settings["num_hidden_layers"]:
            model["ffn_size"] = settings["intermediate_size"]
        window = settings.get("sliding_window") or settings["max_position_embeddings"]
        model |= {
            # In sequences no longer than the window, attention within a window is full attention.
            "max_sequence_length": min(window, settings["max_position_embeddings"]),
            "rope_theta": float(_rotary(settings)["rope_theta"]),
            "norm_eps": float(settings["rms_norm_eps"]),
            # A config that asks for norms where the architecture has none is refused once their weights are missing.
            "qk_norm": self.qk_norm or bool(settings.get("use_qk_norm")),
            "tie_embeddings": bool(settings["tie_word_embeddings"]),
        }
        if settings["initializer_range"] > 0:  # 0 stands in configs of trained models, and means nothing
            model["init_std"] = float(settings["initializer_range"])
        return {"model": model, "moe": self.experts.section(settings) if self.experts and sparse else None}

    def _moe_layers(self, settings: Settings) -> list[int]:
        return [] if self.experts is None else self.experts.layers(settings)


def _value(config: Config, key: str) -> object:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def _rotary(settings: Settings) -> Mapping[str, Any]:
    return settings.get("rope_parameters") or {"rope_theta": settings.get("rope_theta", 10_000.0)}


def _pattern(sparse: list[int], num_layers: int) -> Any:
    """Return (`dense_layers`, `moe_every`) that give these MoE layers; None if none do."""
    every = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    candidates = [
        (sparse[0] + 1 - every, every),
        (0, sparse[0] + 1),
    ]  # with a single MoE layer, the second candidate has none after it
    for first, step in candidates:
        if first >= 0 and [n for n in range(first, num_layers) if (n - first + 1) % step == 0] == sparse:
            return first, step
    return None
