"""Comparison of two models by their logits for the same tokens, in fp32 on the CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmoe.checkpoint.state import BUFFER, MODEL
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Capacity, Config
from dsmoe.interop.tensors import Tensors
from dsmoe.model import build_model
from dsmoe.plan.plan import Plan

TOLERANCE = 1e-3
"""Largest difference of a token's logits taken for rounding, relative to the root mean square of all logits. A weight
used otherwise gives about 1; sums in another order, 1e-6 in small models, and more in deep ones."""
FLIPPED, FLIPPED_TOLERANCE = 0.1, 0.1
"""Share of the tokens that may differ by more, and by how much: where two experts of a token score the same to
rounding, the two libraries may choose differently. In deep models of many experts, a few tokens in a hundred are so."""
_SEQUENCES, _LENGTH = 2, 64
NO_CODE = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every call into transformers: without the second, it asks on standard input whether to run the folder's
Python, and a script that answers `y` runs it."""
_OWN_LAYERS = {"use_safetensors": True, "attn_implementation": "sdpa"}
"""No pickled weights, and not the attention that a config names, which may be somebody's kernel on the hub."""


@dataclass(frozen=True)
class Agreement:
    """Distance of two sets of logits."""

    largest: float
    """Largest difference of two logits."""
    scale: float
    """The root mean square of the first."""
    apart: float
    """Share of the tokens of which some logit differs by more than the tolerance."""

    @property
    def holds(self) -> bool:
        """True if the distance is rounding; NaN is not."""
        return self.apart <= FLIPPED and self.largest <= FLIPPED_TOLERANCE * self.scale

    def __str__(self) -> str:
        text = f"largest difference {self.largest:.3g}, the logits' root mean square {self.scale:.3g}"
        return text if self.apart == 0 else f"{text}, {self.apart:.1%} of the tokens apart by more than rounding"


def compare(logits_BSV: torch.Tensor, reference_BSV: torch.Tensor) -> Agreement:
    """Compare two sets of logits, fp32, of B sequences, S positions and V tokens."""
    scale = float(logits_BSV.square().mean().sqrt())
    difference_BS = (logits_BSV - reference_BSV).abs().amax(dim=-1)
    apart = 1.0 - float((difference_BS <= TOLERANCE * scale).float().mean())
    return Agreement(float(difference_BS.max()), scale, apart)


def sample_tokens(config: Config) -> torch.Tensor:
    """Return the tokens to compare on, [B, S], int64; always the same."""
    length = min(_LENGTH, config.model.max_sequence_length)
    return torch.randint(
        config.model.vocab_size, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0), dtype=torch.int64
    )


@torch.no_grad()
def our_logits(config: Config, tensors: Tensors, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the logits of dsmoe's model of `config`, which drops nothing, with `tensors` as weights; [B, S, V], fp32.

    Args:
        config: the run.
        tensors: the run's weights and selection biases.
        dtype: the type that weights are rounded to first; None leaves them.
    """
    model = build_model(dropless(config)).eval()
    targets = {f"{MODEL}/{name}": parameter.data for name, parameter in model.named_parameters()}
    targets |= {f"{BUFFER}/{name}": x for name, x in model.named_buffers() if name.endswith("balance.bias")}
    for key, target in targets.items():
        if key.startswith(BUFFER) and key not in tensors:
            continue  # a model without selection biases: they begin at 0
        tensor = tensors[key].read()
        if dtype is not None and key.startswith(MODEL):
            tensor = tensor.to(dtype)
        target.copy_(tensor)
    return model.logits(sample_tokens(config))


@torch.no_grad()
def hf_logits(folder: Path, config: Config) -> torch.Tensor:
    """Return the logits of the transformers model in a folder, [B, S, V], fp32; `config` is of the run compared to.

    Raises:
        UserError: the model cannot be loaded, or not with every tensor in its place.
    """
    transformers = import_transformers()
    with _quiet(transformers):
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **NO_CODE, **_OWN_LAYERS
            )
        except Exception as error:  # of any type: it is transformers' code
            raise UserError(f"transformers cannot load {folder}: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise UserError(f"transformers reports {what.replace('_', ' ')} in {folder}: {sorted(report[what])[:5]}")
    logits: torch.Tensor = model.eval()(sample_tokens(config)).logits
    return logits


def dropless(config: Config) -> Config:
    """Return the same run on one rank, without a capacity: no other library has one."""
    if config.moe is None:
        return config
    parallel = config.parallel.model_copy(update={"overlap_chunks": 1})
    moe = config.moe.model_copy(update={"capacity": Capacity()})
    return config.model_copy(update={"parallel": parallel, "moe": moe})


def check_memory(config: Config) -> None:
    """Check that two models of this size fit into the free memory.

    Raises:
        UserError: they do not.
    """
    needed = 2 * 4 * Plan.from_config(config).parameters.total
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # memory of the page cache is available as well
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    if needed > free:
        raise UserError(
            f"comparing the logits takes two models in fp32, about {needed / 2**30:.0f} GiB, and "
            f"{free / 2**30:.0f} GiB are free; run it where there is more, or without the comparison (--no-check)"
        )


def refuse_code(folder: Path) -> None:
    """Refuse a folder whose config needs classes of its own, before transformers looks at the folder.

    Raises:
        UserError: the config names such classes, and transformers has none for the model.
    """
    try:
        settings = json.loads((folder / "config.json").read_bytes())
        classes, model_type = settings.get("auto_map"), settings.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'} is not the config of a model: {error}") from None
    known = import_transformers().models.auto.configuration_auto.CONFIG_MAPPING
    if classes and not (isinstance(model_type, str) and model_type in known):
        raise UserError(
            f"{folder / 'config.json'} names Python of its own (auto_map) for model_type {model_type!r}, and dsmoe "
            "runs no code of a folder; only architectures that are in transformers itself can be read"
        )


def import_transformers() -> Any:
    """Import transformers; raise a UserError that says how to install it where it is missing."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "this needs the `transformers` library: pip install 'dsmoe[hf]'. (An export can do without: --no-check.)"
        ) from None
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """HeartbeatTimer the library's progress bars and advice: its loading report is checked instead."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
