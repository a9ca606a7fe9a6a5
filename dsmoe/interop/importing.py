"""`dsmoe checkpoint import`: a Hugging Face folder as a checkpoint of dsmoe's, which any layout begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.compatibility import refuse, rows
from dsmoe.checkpoint.folder import inspect
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Model, Moe
from dsmoe.config.yaml_text import write_yaml
from dsmoe.interop.architectures import architecture_of
from dsmoe.interop.huggingface import folder_entries, folder_tensors, read_settings
from dsmoe.interop.logits import check_memory, compare, hf_logits, our_logits
from dsmoe.interop.model_files import whole_folder
from dsmoe.interop.names import matches
from dsmoe.interop.sections import describe, sections_of
from dsmoe.interop.tensors import checkpoint_tensors
from dsmoe.interop.weights import write_checkpoint
from dsmoe.launch.quoting import path_override


def fitting_sections(folder: Path) -> str:
    """Return the sections of dsmoe's config that fit the model in a folder, as YAML.

    Raises:
        UserError: no config of dsmoe's fits.
    """
    settings = read_settings(folder)
    found: dict[str, Any] = sections_of(settings)
    if (folder / "tokenizer.json").is_file():
        found["data"] = {"tokenizer": str(folder.absolute() / "tokenizer.json")}
    return write_yaml(found)


def import_folder(
    folder: Path, out: Path, config: Config, check: bool = True, say: Callable[[str], None] = print
) -> None:
    """Write the weights of a folder as the checkpoint `out` of step 0, which appears whole or not at all.

    One tensor is in memory at a time, but for the comparison of the logits. Weights keep the type that they have.

    Args:
        folder: Hugging Face's.
        out: a folder that is not there yet.
        config: the run that is to begin with the weights.
        check: compare the logits of dsmoe's model with those of transformers'.
        say: called with each line of output.

    Raises:
        UserError: the folder is damaged, is of another model than the config's, or the logits differ.
    """
    settings = read_settings(folder)
    architecture = architecture_of(settings)
    check_same(folder, config, settings)
    if check:
        check_memory(config)
    pairs = list(matches(config, architecture.names))
    tensors = folder_tensors(folder, folder_entries(folder), pairs)
    with whole_folder(out) as partial_folder:
        write_checkpoint(partial_folder, config, tensors, f"import of {folder.absolute()}")
        written = inspect(partial_folder)
        if check:
            ours = our_logits(config, checkpoint_tensors(partial_folder, written))
            agreement = compare(ours, hf_logits(folder, config))
            if not agreement.holds:
                raise UserError(f"our model computes something else: {agreement}; {out} was not written")
            say(f"the same logits as transformers' model: {agreement}")
        else:
            say("not compared with transformers' model (--no-check)")
    size = sum(file.bytes for file in written.files.values())
    say(f"wrote {out}: {len(pairs)} tensors of a {architecture.name} model, {size / 1e9:.2f} GB")
    say(f"to begin a run with it: {path_override('checkpoint.weights_from', str(out))}")


def check_same(folder: Path, config: Config, settings: dict[str, Any]) -> None:
    """Check that dsmoe's config and Hugging Face's `settings` describe the same model.

    Raises:
        UserError: they do not; with a table of what differs, and the sections that would fit.
    """
    sections = sections_of(settings)
    fitting = with_sections(config, sections)
    try:
        refuse(folder, "another model", rows(describe(fitting), describe(config)))
    except UserError as error:
        raise UserError(f"{error}\nThis fits it:\n{write_yaml(sections)}") from None
    window, longest = fitting.model.max_sequence_length, config.model.max_sequence_length
    if settings.get("sliding_window") and longest > window:
        raise UserError(
            f"model.max_sequence_length ({longest}) must be at most {window}: the model in {folder} attends to a "
            f"sliding window of that length, and ours to everything"
        )


def with_sections(config: Config, sections: dict[str, Any]) -> Config:
    """Return a config with other `model` and `moe` sections."""
    moe = sections["moe"]
    update = {"model": Model.model_validate(sections["model"]), "moe": moe and Moe.model_validate(moe)}
    return config.model_copy(update=update)
