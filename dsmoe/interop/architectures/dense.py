"""Llama, Mistral and Qwen3: architectures without experts, with or without norms of queries and keys."""

from __future__ import annotations

from typing import Any

from dsmoe.config.schema import Config
from dsmoe.interop.architectures.architecture import Architecture


def _settings(config: Config) -> dict[str, Any]:
    return {"intermediate_size": config.model.ffn_size}


LLAMA = Architecture(name="llama", class_name="LlamaForCausalLM", settings=_settings)
MISTRAL = Architecture(name="mistral", class_name="MistralForCausalLM", settings=_settings)
QWEN3 = Architecture(name="qwen3", class_name="Qwen3ForCausalLM", settings=_settings, qk_norm=True)
