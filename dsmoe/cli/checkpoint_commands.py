"""The command `dsmoe checkpoint`: show, verify, export, import and upcycle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsmoe.cli.config_arguments import add_override_arguments, load
from dsmoe.config import UserError


def add_commands(commands: Any) -> None:
    """Add `dsmoe checkpoint`."""
    checkpoint = commands.add_parser("checkpoint", help="look at a checkpoint, check it, or convert it")
    actions = checkpoint.add_subparsers(title="commands", metavar="COMMAND", required=True)
    contents = actions.add_parser("show", help="what is inside: step, layout, sizes")
    contents.add_argument("--tensors", action="store_true", help="every tensor as well")
    contents.add_argument("--against", metavar="OTHER", help="a YAML file or a checkpoint: show what differs from it")
    _add_checkpoint_argument(contents, _show)
    verify = actions.add_parser("verify", help="check that every file is what was written; exit code 2 if not")
    _add_checkpoint_argument(verify, _verify)
    _add_export(actions)
    _add_import(actions)
    _add_upcycle(actions)


def _add_checkpoint_argument(parser: argparse.ArgumentParser, run: object) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint, or a run's folder: its newest one")
    parser.set_defaults(run=run)


def _show(arguments: argparse.Namespace) -> None:
    from dsmoe.checkpoint.inspection import compare, one_checkpoint, summary

    checkpoint = one_checkpoint(arguments.path)
    difference = f"\n\n{compare(checkpoint, Path(arguments.against))}" if arguments.against else ""
    print(summary(checkpoint, arguments.tensors) + difference)


def _verify(arguments: argparse.Namespace) -> None:
    from dsmoe.checkpoint.folder import verify
    from dsmoe.checkpoint.inspection import gigabytes, newest_checkpoint, not_listed
    from dsmoe.plan.text import quantity

    checkpoint = newest_checkpoint(arguments.path)
    manifest = verify(checkpoint)
    files = manifest.files
    size = sum(file.bytes for file in files.values())
    print(f"{checkpoint} is whole: {quantity(len(files), 'file')}, {gigabytes(size)}, every byte as it was written")
    for line in not_listed(checkpoint, manifest):
        print(line)


def _add_export(actions: Any) -> None:
    export = actions.add_parser("export", help="write it as a folder that Hugging Face transformers loads")
    _add_checkpoint_argument(export, _export)
    export.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    export.add_argument(
        "--format", help="mixtral, qwen3_moe, glm4_moe (DeepSeek-V3's routing), llama, qwen3 or mistral"
    )
    export.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default: bf16)")
    export.add_argument(
        "--shard-gb", metavar="GB", type=_positive_number, default=5.0, help="the most in a file (default: 5)"
    )
    export.add_argument("--tokenizer", metavar="FILE", help="in place of data.tokenizer; `none` for none")
    _add_no_check_option(export)


def _export(arguments: argparse.Namespace) -> None:
    from dsmoe.checkpoint.inspection import one_checkpoint
    from dsmoe.interop.export import export

    export(
        one_checkpoint(arguments.path),
        arguments.out,
        arguments.format,
        arguments.dtype,
        int(arguments.shard_gb * 1e9),
        arguments.tokenizer,
        check=not arguments.no_check,
    )


def _add_import(actions: Any) -> None:
    importing = actions.add_parser(
        "import", help="make one of a Hugging Face folder, or print the sections that fit it"
    )
    importing.add_argument("folder", metavar="FOLDER", type=Path, help="with config.json and *.safetensors")
    importing.add_argument("out", metavar="OUT", type=Path, nargs="?", help="the checkpoint; without, print sections")
    importing.add_argument("--config", metavar="CONFIG", help="the YAML file of the run that is to begin with it")
    add_override_arguments(importing)
    importing.set_defaults(run=_import)
    _add_no_check_option(importing)


def _import(arguments: argparse.Namespace) -> None:
    config = None if arguments.config is None else load(arguments)
    from dsmoe.interop.importing import fitting_sections, import_folder

    if arguments.out is None:
        if arguments.config is not None:
            raise UserError("to write a checkpoint, say where as well: import FOLDER OUT --config CONFIG")
        print(fitting_sections(arguments.folder), end="")
        return
    if config is None:
        raise UserError("to write a checkpoint, give the run's YAML file: --config CONFIG")
    import_folder(arguments.folder, arguments.out, config, not arguments.no_check)


def _add_upcycle(actions: Any) -> None:
    upcycle = actions.add_parser("upcycle", help="make an MoE model's of a dense one that computes the same")
    upcycle.add_argument("source", metavar="SOURCE", type=Path, help="a dense checkpoint, or a Hugging Face folder")
    upcycle.add_argument("out", metavar="OUT", type=Path, help="the checkpoint to write")
    upcycle.add_argument("--config", metavar="CONFIG", required=True, help="the YAML file of the MoE run")
    upcycle.add_argument(
        "--noise", metavar="S", type=_non_negative_number, default=0.0, help="S times an expert's RMS is added"
    )
    add_override_arguments(upcycle)
    upcycle.set_defaults(run=_upcycle)
    _add_no_check_option(upcycle)


def _upcycle(arguments: argparse.Namespace) -> None:
    config = load(arguments)
    from dsmoe.interop.upcycle import upcycle

    upcycle(arguments.source, arguments.out, config, arguments.noise, not arguments.no_check)


def _add_no_check_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-check", action="store_true", help="do not compare logits: the models exceed the memory")


def _positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _non_negative_number(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive_number(text)
