"""Registry of the Hugging Face architectures that dsmoe's options can be written as, and reasons why others cannot.

Each has an entry (`Architecture`) that holds all that depends on its name, for export and for import: its config, the
names of its tensors, what it cannot express. A new one is a file with an entry, and its place in `ARCHITECTURES`; other
code asks the entry and compares no names.

What each computes was read in transformers 5.23's own files (`models/NAME/modeling_NAME.py`). All of them rotate halves
of a head's vector (rotary positions) as dsmoe does.
"""

from __future__ import annotations

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.interop.architectures.architecture import Architecture
from dsmoe.interop.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from dsmoe.interop.architectures.dense import LLAMA, MISTRAL, QWEN3
from dsmoe.interop.architectures.glm4_moe import GLM4_MOE
from dsmoe.interop.architectures.mixtral import MIXTRAL
from dsmoe.interop.architectures.parts import Settings
from dsmoe.interop.architectures.qwen3_moe import QWEN3_MOE
from dsmoe.plan.layers import dense_layers

ARCHITECTURES = {a.name: a for a in (MIXTRAL, QWEN3_MOE, GLM4_MOE, LLAMA, QWEN3, MISTRAL)}
"""In the order in which an export tries them where none is named."""
REFUSED = {one.name: one for one in (DEEPSEEK_V2, DEEPSEEK_V3)}
"""Architectures that are refused with a reason of their own."""


def choose(config: Config, name: str | None) -> Architecture:
    """Return the architecture of this name, or the first that fits where `name` is None.

    Raises:
        UserError: that architecture, or every one, cannot express the config's options; with all the reasons.
    """
    reason = REFUSED[name].why_not_written if name in REFUSED else None
    if reason is not None:
        raise UserError(f"the model cannot be written as {name}: {reason}")
    if name is not None and name not in ARCHITECTURES:
        raise UserError(f"there is no format {name!r}; give one of {', '.join(ARCHITECTURES)}")
    tried = {a.name: a.refusals(config) for a in ARCHITECTURES.values() if name in (None, a.name)}
    fitting = next((one for one, refusals in tried.items() if not refusals), None)
    if fitting is not None:
        return ARCHITECTURES[fitting]
    has_experts = len(dense_layers(config)) < config.model.num_layers
    shown = {one: r for one, r in tried.items() if name or (ARCHITECTURES[one].experts is not None) == has_experts}
    reasons = [f"  {one}: {refusal}" for one, refusals in shown.items() for refusal in refusals]
    raise UserError("\n".join([f"the model cannot be written as {' or '.join(shown)}:", *reasons]))


def architecture_of(settings: Settings) -> Architecture:
    """Return the architecture of a Hugging Face config.

    Raises:
        UserError: dsmoe cannot read models of it.
    """
    name = settings.get("model_type")
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    reason = f": {REFUSED[name].why_not_read}" if isinstance(name, str) and name in REFUSED else ""
    raise UserError(f"model_type {name!r} cannot be read{reason}; these can: {', '.join(ARCHITECTURES)}")
