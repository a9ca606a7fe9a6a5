"""Types and ranges of the keys of a Hugging Face config that are read.

The config is checked before transformers sees it, since transformers makes a list as long as the number of layers or
labels says, and again with transformers' defaults in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from dsmoe.config.errors import UserError
from dsmoe.config.sections.base import Layers, Length, NonNegativeFloat, PositiveFloat, Width
from dsmoe.config.yaml_text import show_value
from dsmoe.interop.architectures import ARCHITECTURES
from dsmoe.interop.architectures.architecture import Architecture
from dsmoe.interop.architectures.parts import Count

_NEEDED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
)
"""Keys that must not be null, besides those of the architecture's entry."""


class _Part(BaseModel):
    """Keys that may be missing or null, among others that are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Rotary(_Part):
    model_config = ConfigDict(strict=True, extra="allow")

    rope_type: str | None = None
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: PositiveFloat | None = None


class _Common(_Part):
    """The keys that a config of any architecture may have."""

    model_type: str | None = None
    vocab_size: Length | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Width | None = None
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    max_position_embeddings: Length | None = None
    sliding_window: Annotated[int, Field(ge=0, le=2**31)] | None = None
    rms_norm_eps: PositiveFloat | None = None
    initializer_range: NonNegativeFloat | None = None
    rope_theta: PositiveFloat | None = None
    rope_parameters: _Rotary | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: PositiveFloat | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    layer_types: Annotated[list[str], Field(max_length=10_000)] | None = None
    use_qk_norm: bool | None = None
    num_labels: Count | None = None


@lru_cache(maxsize=16)
def _kinds(own: Architecture | None, entries: tuple[Architecture, ...]) -> type[_Common]:
    """Return the common keys and all entries' (a config without a name may be of any); types of `own` come first."""
    keys: dict[str, Any] = {}
    for entry in entries:
        for key, kind in {**entry.keys, **entry.optional_keys}.items():
            keys.setdefault(key, kind)
    keys = {key: kind for key, kind in keys.items() if key not in _Common.model_fields}
    if own is not None:
        keys |= {**own.keys, **own.optional_keys}
    fields: dict[str, Any] = {key: (kind | None, None) for key, kind in keys.items()}
    return create_model("_Settings", __base__=_Common, **fields)


def check_settings(settings: Mapping[str, Any], with_defaults: bool) -> dict[str, Any]:
    """Return the settings with numbers of the declared types; `with_defaults` demands the needed keys.

    Raises:
        UserError: some keys have impossible values, or are missing; with all of them.
    """
    own = ARCHITECTURES.get(str(settings.get("model_type")))
    try:
        values = (
            _kinds(own, tuple(ARCHITECTURES.values())).model_validate(dict(settings)).model_dump(exclude_unset=True)
        )
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        problems = [f"{'.'.join(map(str, one['loc']))} ({show_value(one['input'])}): {one['msg']}" for one in found]
        raise UserError("\n  ".join(["not the config of a model:", *problems[:50]])) from None
    if with_defaults:
        needed = (*_NEEDED, *(own.keys if own else ()))
        missing = [key for key in needed if values.get(key) is None]
        rotary = values.get("rope_parameters")
        missing += ["rope_parameters.rope_theta"] if rotary and rotary.get("rope_theta") is None else []
        if missing:
            raise UserError(f"there is no {' and no '.join(missing)}; a model of this type has a value for each")
    return {**settings, **values}
