"""Reading a Hugging Face folder: its config, and its tensors by dsmoe's names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from dsmoe.checkpoint.headers import TensorEntry
from dsmoe.checkpoint.safetensors import DTYPES
from dsmoe.checkpoint.state import BUFFER
from dsmoe.config.errors import UserError
from dsmoe.interop.architectures import architecture_of
from dsmoe.interop.logits import NO_CODE, import_transformers, refuse_code
from dsmoe.interop.model_files import read_entry, read_header
from dsmoe.interop.names import Match
from dsmoe.interop.settings import check_settings
from dsmoe.interop.tensors import ChunkedTensor, LazyChunk, Tensors
from dsmoe.runtime.atomic_files import check_regular

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_DERIVED = ".rotary_emb.inv_freq"
"""Buffers in old files, which follow from the config."""
_SHOWN = 10


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the folder's config with all defaults of its architecture; runs no code of the folder's.

    Raises:
        UserError: the config is missing, unreadable, of another architecture, or has impossible values.
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
    except Exception as error:  # of any type: it is transformers' code
        raise UserError(f"transformers cannot read it: {error}") from error


def folder_entries(folder: Path) -> dict[str, TensorEntry]:
    """Return the place of each tensor by its name; reads headers alone.

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
    return {tensor: entry for entries in headers.values() for tensor, entry in entries.items()}


def folder_tensors(folder: Path, entries: Mapping[str, TensorEntry], pairs: Sequence[Match]) -> Tensors:
    """Return the model's tensors by dsmoe's names.

    Raises:
        UserError: tensors are missing, superfluous, of another shape or type, or not zero where dsmoe's model has none;
            with all of them.
    """
    problems = [f"{pair.hf_name} is missing" for pair in pairs if pair.hf_name not in entries]
    wanted = {pair.hf_name: pair for pair in pairs}
    problems += [f"{name} has no counterpart" for name in sorted(entries.keys() - wanted) if not _idle(name, entries)]
    for name, pair in wanted.items():
        if name in entries:
            problems += _misfits(entries[name], pair)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        heading = f"the tensors of {folder} are not those of its config's model:"
        raise UserError("\n  ".join([heading, *problems[:_SHOWN], *more]))
    by_key: dict[str, list[tuple[Match, TensorEntry]]] = {}
    for pair in pairs:
        if pair.key is not None:
            by_key.setdefault(pair.key, []).append((pair, entries[pair.hf_name]))
    return {key: _chunked(key, sources) for key, sources in by_key.items()}


def _in_fp32(entry: TensorEntry) -> torch.Tensor:
    return read_entry(entry).float()


def _chunked(key: str, sources: Sequence[tuple[Match, TensorEntry]]) -> ChunkedTensor:
    shape = sources[0][0].shape
    if key.startswith(f"{BUFFER}/"):  # fp32 in a model, whatever its weights are in
        chunks = [LazyChunk(pair.box, partial(_in_fp32, entry)) for pair, entry in sources]
        return ChunkedTensor(torch.float32, shape, chunks)
    dtype = reduce(torch.promote_types, (DTYPES[entry.dtype] for _, entry in sources))
    return ChunkedTensor(dtype, shape, [LazyChunk(pair.box, partial(read_entry, entry)) for pair, entry in sources])


def _misfits(entry: TensorEntry, pair: Match) -> list[str]:
    if entry.shape != pair.hf_shape:
        return [f"{pair.hf_name} has shape {list(entry.shape)} and should have {list(pair.hf_shape)}"]
    if entry.dtype not in _FLOATS:
        return [f"{pair.hf_name} is of type {entry.dtype}, which is none of {', '.join(_FLOATS)}"]
    if pair.key is None and read_entry(entry).any():
        return [f"{pair.hf_name} is not zero; set moe.balance.bias_update_rate above 0, so that our model has it too"]
    return []


def _idle(name: str, entries: Mapping[str, TensorEntry]) -> bool:
    """Return whether a tensor that dsmoe's model lacks is redundant: an old buffer, or tied embeddings again."""
    if name.endswith(_DERIVED):
        return True
    table = entries.get("model.embed_tokens.weight")
    if name != "lm_head.weight" or table is None or entries[name].shape != table.shape:
        return False
    return torch.equal(read_entry(entries[name]), read_entry(table))
