"""`dsmoe checkpoint export`: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dsmoe.checkpoint.folder import verify
from dsmoe.checkpoint.manifest import Manifest
from dsmoe.checkpoint.safetensors import LazyTensor, write_tensors
from dsmoe.checkpoint.state import BUFFER, MODEL
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.interop.architectures import choose
from dsmoe.interop.architectures.architecture import Architecture
from dsmoe.interop.export_tokenizer import TokenizerFiles, tokenizer_files
from dsmoe.interop.logits import check_memory, compare, hf_logits, our_logits
from dsmoe.interop.model_files import whole_folder
from dsmoe.interop.names import BIAS, Match, matches
from dsmoe.interop.tensors import Tensors, checkpoint_tensors
from dsmoe.runtime.atomic_files import write_synced
from dsmoe.train.changed import saved_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 5_000_000_000
"""Default bound of a file's size; a single tensor may be larger."""


def export(
    checkpoint: Path,
    out: Path,
    architecture: str | None = None,
    dtype: str = "bf16",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | None = None,
    check: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Write the checkpoint's weights, config and tokenizer as the folder `out`, which appears whole or not at all.

    One tensor is in memory at a time, but for the comparison of the logits.

    Args:
        checkpoint: dsmoe's.
        out: a folder that is not there yet.
        architecture: a `model_type` of Hugging Face's; None takes the first that can express the model.
        dtype: of the weights that are written, `bf16` or `fp32`. Selection biases stay fp32.
        shard_bytes: the most that a file has.
        tokenizer: a file in place of `data.tokenizer`; `none` for none.
        check: compare the logits of transformers' model with those of dsmoe's.
        say: called with each line of output.

    Raises:
        UserError: the model cannot be expressed, the checkpoint is damaged, or the logits differ.
    """
    manifest = verify(checkpoint)
    config = config_of(checkpoint, manifest)
    chosen = choose(config, architecture)
    say(f"{checkpoint}, step {manifest.facts.step}, as {chosen.name} in {dtype}")
    if check:
        check_memory(config)
    files = tokenizer_files(config, tokenizer, saved_tokenizer(manifest.facts))
    if not files.is_trained:
        say(f"the contents of the tokenizer {tokenizer} are not those that the model was trained with")
    tensors = checkpoint_tensors(checkpoint, manifest)
    pairs = list(matches(config, chosen.names))
    check_complete(checkpoint, tensors, pairs)
    with whole_folder(out) as partial_folder:
        weight_files = _files([_lazy_tensor(match, tensors, DTYPES[dtype]) for match in pairs], shard_bytes)
        _write_weights(partial_folder, weight_files)
        _write_settings(partial_folder, chosen, config, DTYPES[dtype], files)
        if check:
            agreement = compare(our_logits(config, tensors, DTYPES[dtype]), hf_logits(partial_folder, config))
            if not agreement.holds:
                raise UserError(f"transformers' model computes something else: {agreement}; {out} was not written")
            say(f"the same logits from transformers' model: {agreement}")
        else:
            say("not compared with transformers' model (--no-check)")
    if config.moe is not None and config.moe.capacity.eval_factor is not None:
        say(f"moe.capacity.eval_factor ({config.moe.capacity.eval_factor}) is left behind: transformers drops nothing")
    size = sum(tensor.bytes for file in weight_files for tensor in file)
    num_files = len(weight_files)
    say(f"wrote {out}: {len(pairs)} tensors, {size / 1e9:.2f} GB in {num_files} file{'s' * (num_files > 1)}")


def config_of(checkpoint: Path, manifest: Manifest) -> Config:
    """Return the config of the run that wrote a checkpoint; raises UserError if this version cannot read it."""
    try:
        return Config.model_validate(manifest.facts.config)
    except ValidationError as error:
        raise UserError(f"{checkpoint} was written with a config that this version does not know: {error}") from None


def check_complete(source: Path, tensors: Tensors, pairs: Sequence[Match]) -> None:
    """Check that `tensors` has exactly the tensors that the pairs take.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape; with the names.
    """
    wanted = {pair.key: pair.shape for pair in pairs if pair.key is not None}
    mapped = {key for key in tensors if key.startswith(f"{MODEL}/") or key.endswith("balance.bias")}
    # Checkpoints of weights alone may lack the selection biases, which then begin at 0.
    problems = [f"{key} is missing" for key in wanted if key not in tensors and not key.endswith(BIAS)]
    problems += [f"{key} has no counterpart" for key in sorted(mapped - wanted.keys())]
    problems += [
        f"{key} has shape {list(tensors[key].shape)} and should have {list(shape)}"
        for key, shape in wanted.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if problems:
        raise UserError("\n  ".join([f"the tensors of {source} are not those of its model:", *sorted(problems)]))


def _lazy_tensor(match: Match, tensors: Tensors, dtype: torch.dtype) -> LazyTensor:
    if match.key is None or (match.key.endswith(BIAS) and match.key not in tensors):
        return LazyTensor(match.hf_name, torch.float32, match.hf_shape, partial(torch.zeros, match.hf_shape))
    tensor = tensors[match.key]

    def make() -> torch.Tensor:
        return tensor.read(match.box).view(match.hf_shape)

    return LazyTensor(match.hf_name, torch.float32 if match.key.startswith(BUFFER) else dtype, match.hf_shape, make)


def _files(tensors: Sequence[LazyTensor], most_bytes: int) -> list[list[LazyTensor]]:
    """Group the tensors by file, in order; within a file those of wider elements first, so that all are aligned."""
    files: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.bytes > most_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.bytes
    return [sorted(file, key=lambda tensor: -tensor.dtype.itemsize) for file in files]


def _write_weights(folder: Path, files: Sequence[Sequence[LazyTensor]]) -> None:
    """Write `model.safetensors`, or numbered files and their index."""
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for name, file in zip(names, files, strict=True):
        write_tensors(folder / name, file, {"format": "pt"})
    if len(files) > 1:
        total = sum(tensor.bytes for file in files for tensor in file)
        places = dict(sorted((t.name, name) for name, file in zip(names, files, strict=True) for t in file))
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _write_settings(
    folder: Path, architecture: Architecture, config: Config, dtype: torch.dtype, files: TokenizerFiles
) -> None:
    end = None if files.end is None else files.end[1]
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    name = str(dtype).removeprefix("torch.")
    settings = architecture.export(config) | special | {"dtype": name, "torch_dtype": name}
    _write_json(folder / "config.json", settings)
    _write_json(folder / "generation_config.json", special)
    for file, text in files.files.items():
        write_synced(folder / file, text)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_synced(path, json.dumps(content, indent=2) + "\n")
