"""A Hugging Face folder: its config, and its tensors by our names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from dsmoe.checkpoint.state import BUFFER
from dsmoe.config.errors import UserError
from dsmoe.interop.architectures import architecture_of
from dsmoe.interop.logits import NO_CODE, import_transformers, refuse_code
from dsmoe.interop.model_files import Slot, read_header
from dsmoe.interop.names import Match
from dsmoe.interop.settings import check_settings
from dsmoe.interop.tensors import Tensors, Tile, Tiled
from dsmoe.runtime.atomic_files import check_regular

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_DERIVED = ".rotary_emb.inv_freq"
"""Buffers that old files have, and that follow from the config."""
_SHOWN = 10


def read_settings(folder: Path) -> dict[str, Any]:
    """The folder's config with all defaults of its architecture; runs no code of the folder's.

    Raises:
        UserError: it has none that can be read, is of another architecture, or has values that cannot be.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a folder of Hugging Face's: there is no {folder / 'config.json'}")
    refuse_code(folder)
    given = json.loads((folder / "config.json").read_bytes())
    try:
        if given.get("model_type") is not None:  # else transformers goes by the folder's name
            architecture_of(given)
        check_settings(given, with_defaults=False)
        found: dict[str, Any] = _with_defaults(folder)
        architecture_of(found)
        return check_settings(found, with_defaults=True)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def _with_defaults(folder: Path) -> dict[str, Any]:
    try:
        return dict(import_transformers().AutoConfig.from_pretrained(folder, **NO_CODE).to_dict())
    except Exception as error:  # whatever their code makes of it
        raise UserError(f"transformers cannot read it: {error}") from error


def read_slots(folder: Path) -> dict[str, Slot]:
    """Where each tensor is; reads none of them.

    Raises:
        UserError: a file is missing, truncated, or not what the index says.
    """
    if (folder / _SINGLE).exists():
        return read_header(folder / _SINGLE)
    if not (folder / _INDEX).exists():
        raise UserError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; pickled weights (*.bin) are not read: save the model with "
            f"save_pretrained of transformers 5 first"
        )
    try:
        check_regular(folder / _INDEX)
        places: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a file outside of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / _INDEX} is not an index of safetensors files: {error}") from None
    headers = {name: read_header(folder / name) for name in names}
    for tensor, name in places.items():
        if tensor not in headers[name]:
            raise UserError(f"{folder / name} lacks {tensor}, which {_INDEX} says it has")
    return {tensor: slot for slots in headers.values() for tensor, slot in slots.items()}


def folder_tensors(folder: Path, slots: Mapping[str, Slot], pairs: Sequence[Match]) -> Tensors:
    """The model's tensors by our names.

    Raises:
        UserError: one is missing, superfluous, of another shape or type, or not zero where ours has none; all of them.
    """
    problems = [f"{pair.theirs} is missing" for pair in pairs if pair.theirs not in slots]
    wanted = {pair.theirs: pair for pair in pairs}
    problems += [f"{name} has no counterpart" for name in sorted(slots.keys() - wanted) if not _idle(name, slots)]
    for name, pair in wanted.items():
        if name in slots:
            problems += _misfits(slots[name], pair)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        heading = f"the tensors of {folder} are not those of its config's model:"
        raise UserError("\n  ".join([heading, *problems[:_SHOWN], *more]))
    tiles: dict[str, list[tuple[Match, Slot]]] = {}
    for pair in pairs:
        if pair.key is not None:
            tiles.setdefault(pair.key, []).append((pair, slots[pair.theirs]))
    return {key: _tiled(key, parts) for key, parts in tiles.items()}


def _in_fp32(slot: Slot) -> torch.Tensor:
    return slot.read().float()


def _tiled(key: str, parts: Sequence[tuple[Match, Slot]]) -> Tiled:
    if key.startswith(f"{BUFFER}/"):  # which a model has in fp32, whatever its weights are in
        return Tiled(
            torch.float32, parts[0][0].whole, [Tile(pair.box, partial(_in_fp32, slot)) for pair, slot in parts]
        )
    dtype = reduce(torch.promote_types, (slot.torch_dtype for _, slot in parts))
    return Tiled(dtype, parts[0][0].whole, [Tile(pair.box, slot.read) for pair, slot in parts])


def _misfits(slot: Slot, pair: Match) -> list[str]:
    if slot.shape != pair.shape:
        return [f"{pair.theirs} has shape {list(slot.shape)} and should have {list(pair.shape)}"]
    if slot.dtype not in _FLOATS:
        return [f"{pair.theirs} is of type {slot.dtype}, which is none of {', '.join(_FLOATS)}"]
    if pair.key is None and slot.read().any():
        return [f"{pair.theirs} is not zero; set moe.balance.bias_update_rate above 0, so that our model has it too"]
    return []


def _idle(name: str, slots: Mapping[str, Slot]) -> bool:
    """Whether a tensor that our model lacks says nothing: old buffers, and the second copy of tied embeddings."""
    if name.endswith(_DERIVED):
        return True
    table = slots.get("model.embed_tokens.weight")
    if name != "lm_head.weight" or table is None or slots[name].shape != table.shape:
        return False
    return torch.equal(slots[name].read(), table.read())
