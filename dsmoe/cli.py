"""The `dsmoe` command. Exit codes: 0 done, 2 somebody has to change something (one clear message), 1 anything else."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dsmoe import __version__
from dsmoe.config import Config, UserError, dump_config, load_config
from dsmoe.config.errors import Problem, describe, exit_code_of, located
from dsmoe.config.load import Look
from dsmoe.config.show import json_schema
from dsmoe.console import finish_streams, open_missing_streams
from dsmoe.launch.job import Request, default_folder
from dsmoe.launch.programs import activation
from dsmoe.launch.speaker import print_for_host
from dsmoe.launch.start import INTERRUPTED, Parser, UsageError, begin_with, end_process, wrong_arguments
from dsmoe.launch.variables import whole_number
from dsmoe.plan import Batch, Plan, headline
from dsmoe.plan.comparison import parse_layouts
from dsmoe.plan.devices import device_problems

# Nothing above imports torch: `dsmoe config` and `dsmoe plan` answer at once, also on a login node. A command
# that needs more imports it when it runs.

_WAYS = {
    "--hostfile": ("hosts", "a hostfile and an environment, for `deepspeed` over ssh"),
    "--slurm": ("slurm", "job scripts, for sbatch"),
    "--docker": ("docker", "a compose file, for containers"),
}
"""How `dsmoe launch` can start a run: the option, the module of dsmoe.launch that writes it, and what it writes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, with the process's own arguments by default, and return the exit code."""
    open_missing_streams()
    parser = _parser()
    try:
        # argparse takes no more overrides after an option: these come back as unknown.
        arguments, rest = parser.parse_known_args(argv)
        if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except UsageError as error:
        sys.exit(_say_wrong_arguments(error))
    if rest:
        arguments.overrides += rest
    try:
        code = arguments.run(arguments) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has seen enough (`| head`)
        finish_streams()
        return 1
    except UserError as error:
        print_for_host(f"error: {error}")  # under a launcher every rank of a host has the same input
        return exit_code_of(error)
    except OSError as error:
        is_of_output = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        print_for_host(f"error: standard output: {describe(error)}" if is_of_output else f"error: {located(error)}")
        finish_streams()
        return exit_code_of(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dsmoe", description="Pretrain Mixture-of-Experts language models on DeepSpeed from one YAML file."
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    config = commands.add_parser("config", help="look at a config, check it, or print its JSON Schema")
    views = config.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = views.add_parser("show", help="print the resolved YAML, every default included")
    _takes_config(show, _show)
    check = views.add_parser("check", help="report every problem at once")
    _takes_config(check, _check)
    schema = views.add_parser("schema", help="print the JSON Schema, for completion in editors")
    schema.set_defaults(run=_schema)

    plan = commands.add_parser("plan", help="say what a run will be: its ranks and groups, batch, parameters, FLOPs")
    plan.add_argument("--json", action="store_true", help="as one JSON object, for a program")
    _takes_config(plan, _plan)

    launch = commands.add_parser("launch", help="write what starts the run on a cluster, and print the command")
    way = launch.add_mutually_exclusive_group(required=True)
    for option, (module, what) in _WAYS.items():
        way.add_argument(option, dest="renderer", action="store_const", const=module, help=what)
    launch.add_argument("--dry-run", action="store_true", help="print the files' text, and write nothing")
    launch.add_argument("--out", metavar="DIR", help="the folder to write to (default: launch/NAME of the run)")
    _takes_config(launch, _launch)

    parity = commands.add_parser("parity", help="train a few steps on several layouts: is it the same model?")
    parity.add_argument(
        "--layouts",
        nargs="+",
        required=True,
        metavar="tp=2,ep=4",
        help="degrees of each layout: tp, sp (sequence), ep, etp, dp, zero, a2a, chunks, nodes, or section.key",
    )
    parity.add_argument("--steps", type=_positive, default=5, help="optimizer steps on each layout (default: 5)")
    parity.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: fp32")
    parity.add_argument("--full", action="store_true", help="the config's own sizes and corpora, not shrunk ones")
    _takes_config(parity, _parity)

    preflight = commands.add_parser("preflight", help="under a launcher: check every node and link before a long job")
    preflight.add_argument("--json", metavar="FILE", type=Path, help="the numbers (default: preflight.json of the run)")
    _takes_config(preflight, _preflight)

    prepare = commands.add_parser("prepare", help="tokenize and pack the corpora, once")
    _takes_config(prepare, _prepare)

    checkpoint = commands.add_parser("checkpoint", help="look at a checkpoint, check it, or convert it")
    actions = checkpoint.add_subparsers(title="commands", metavar="COMMAND", required=True)
    contents = actions.add_parser("show", help="what is inside: step, layout, sizes")
    contents.add_argument("--tensors", action="store_true", help="every tensor as well")
    contents.add_argument("--against", metavar="OTHER", help="a YAML file or a checkpoint: show what differs from it")
    _takes_checkpoint(contents, _checkpoint_show)
    verify = actions.add_parser("verify", help="check that every file is what was written; exit code 2 if not")
    _takes_checkpoint(verify, _checkpoint_verify)
    _add_interop(actions)
    return parser


def _add_interop(actions: Any) -> None:
    export = actions.add_parser("export", help="write it as a folder that Hugging Face transformers loads")
    _takes_checkpoint(export, _checkpoint_export)
    export.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    export.add_argument(
        "--format", help="mixtral, qwen3_moe, glm4_moe (DeepSeek-V3's routing), llama, qwen3 or mistral"
    )
    export.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default: bf16)")
    export.add_argument(
        "--shard-gb", metavar="GB", type=_above_zero, default=5.0, help="the most in a file (default: 5)"
    )
    export.add_argument("--tokenizer", metavar="FILE", help="in place of data.tokenizer; `none` for none")
    _compares_logits(export)
    importing = actions.add_parser(
        "import", help="make one of a Hugging Face folder, or print the sections that fit it"
    )
    importing.add_argument("folder", metavar="FOLDER", type=Path, help="with config.json and *.safetensors")
    importing.add_argument("out", metavar="OUT", type=Path, nargs="?", help="the checkpoint; without, print sections")
    importing.add_argument("--config", metavar="CONFIG", help="the YAML file of the run that is to begin with it")
    _takes_overrides(importing)
    importing.set_defaults(run=_checkpoint_import)
    _compares_logits(importing)
    upcycle = actions.add_parser("upcycle", help="make an MoE model's of a dense one that computes the same")
    upcycle.add_argument("source", metavar="SOURCE", type=Path, help="a dense checkpoint, or a Hugging Face folder")
    upcycle.add_argument("out", metavar="OUT", type=Path, help="the checkpoint to write")
    upcycle.add_argument("--config", metavar="CONFIG", required=True, help="the YAML file of the MoE run")
    upcycle.add_argument("--noise", metavar="S", type=_from_zero, default=0.0, help="S times an expert's RMS is added")
    _takes_overrides(upcycle)
    upcycle.set_defaults(run=_checkpoint_upcycle)
    _compares_logits(upcycle)


def _compares_logits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-check", action="store_true", help="do not compare logits: the models exceed the memory")


def _takes_checkpoint(parser: argparse.ArgumentParser, run: object) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint, or a run's folder: its newest one")
    parser.set_defaults(run=run)


def _takes_config(parser: argparse.ArgumentParser, run: object) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the YAML file")
    _takes_overrides(parser)
    parser.set_defaults(run=run)


def _takes_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="set a key over the file, for example moe.top_k=4"
    )


def _load(arguments: argparse.Namespace, *looks: Look) -> Config:
    return load_config(arguments.config, arguments.overrides, *looks)


def _show(arguments: argparse.Namespace) -> None:
    print(dump_config(_load(arguments)), end="")


def _check(arguments: argparse.Namespace) -> None:
    from dsmoe.config.inputs import input_problems
    from dsmoe.data.check import check_sources
    from dsmoe.launch.hosts import host_problems

    notes: list[str] = []

    def look(config: Config) -> list[Problem]:
        found = check_sources(config)
        notes.extend(found.notes)
        return found.problems

    looks = (input_problems, host_problems, look, device_problems)
    config = load_config(arguments.config, arguments.overrides, *looks)
    batch = Batch.from_config(config)  # lays out the topology, too
    notes += _notes_on_beginning(config)
    print(f"{arguments.config}: ok")
    print(headline(config, batch.topology))
    print(batch.explain())
    _say(notes)


def _notes_on_beginning(config: Config) -> Sequence[str]:
    """What a start would say of its run folder and of the checkpoint that it begins with.

    Raises:
        UserError: it would refuse them.
    """
    start = config.checkpoint
    has_none = start.resume in ("auto", "never") and start.weights_from is None
    if has_none and not Path(config.runs_dir, config.name).exists():
        return ()
    from dsmoe.train.folder import check_run_folder  # which imports torch

    return check_run_folder(config).notes


def _plan(arguments: argparse.Namespace) -> None:
    config = _load(arguments, device_problems)
    plan = Plan.from_config(config)
    notes = _notes_on_sources(config)
    print(json.dumps(plan.json(), indent=2) if arguments.json else plan.text())
    _say(notes)


def _launch(arguments: argparse.Namespace) -> None:
    config = _load(arguments, device_problems)
    topology = Batch.from_config(config).topology  # what `dsmoe config check` checks
    notes = _notes_on_sources(config)
    folder = arguments.out or default_folder(config)
    request = Request(config, arguments.config, tuple(arguments.overrides), folder)
    job = import_module(f"dsmoe.launch.{arguments.renderer}").job(request)
    heading = headline(config, topology)
    if arguments.dry_run:
        print(heading)
        for name, text in job.files.items():
            print(f"\n==> {Path(folder) / name}\n{text}", end="")
    else:
        paths = job.write(Path(folder))
        print("\n".join([heading, *(f"wrote {path}" for path in paths)]))
    if job.warning:
        print(f"\n{job.warning}")
    _say(notes)
    if arguments.renderer == "hosts" and (first := activation("deepspeed")) is not None:
        print(f"\nthis shell does not find deepspeed by its name; type first:\n{first}")
    print(f"\nto start it, type in this folder:\n{job.command}")


def _notes_on_sources(config: Config) -> list[str]:
    """Whose text is not here, and whether the cache has it; a plan needs neither."""
    from dsmoe.data.files import may_be_lost

    lost = [source for source in config.data.sources if may_be_lost(source)]
    if any(any(Path(config.data.cache_dir).glob(f"{source.name}-*")) for source in lost):
        from dsmoe.data.check import notes_on_sources  # which takes a while

        return notes_on_sources(config)
    advice = "`dsmoe config check`, where the run is to be, says whether it is there"
    return [f"data.sources[{source.name}].path: there is no text at {source.path}; {advice}" for source in lost]


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _parity(arguments: argparse.Namespace) -> int:
    def check(_: Config) -> None:
        parse_layouts(arguments.layouts, whole_number(os.environ, "WORLD_SIZE") if "RANK" in os.environ else None)

    start = begin_with(arguments.config, arguments.overrides, check)
    code = start.ended()
    if code is None:
        from dsmoe.train.parity import check_parity

        options = {"steps": arguments.steps, "precision": arguments.precision, "full": arguments.full}
        code = check_parity(arguments.config, arguments.overrides, arguments.layouts, **options)
    if "RANK" in os.environ:
        end_process(code)
    return code


def _preflight(arguments: argparse.Namespace) -> None:
    start = begin_with(arguments.config, arguments.overrides)
    code = start.ended()
    if code is None:
        from dsmoe.preflight.run import check_cluster

        code = check_cluster(start, arguments.json)
    end_process(code)


def _say_wrong_arguments(error: UsageError) -> int:
    """Say what is wrong with the arguments, on one of the ranks; returns the exit code."""
    code = wrong_arguments(error).ended()
    if code is None:  # rank 0 has other arguments, and waits for this rank
        from dsmoe.train.run import ended_by

        code = ended_by(error)
    return code


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _from_zero(text: str) -> float:
    return 0.0 if float(text) == 0 else _above_zero(text)


def _schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))


def _prepare(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from dsmoe.data import prepare

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sources = prepare(config)
    print(f"{len(sources)} sources ready in {config.data.cache_dir}")


def _checkpoint_show(arguments: argparse.Namespace) -> None:
    from dsmoe.checkpoint.show import compare, one_checkpoint, summary

    checkpoint = one_checkpoint(arguments.path)
    difference = f"\n\n{compare(checkpoint, Path(arguments.against))}" if arguments.against else ""
    print(summary(checkpoint, arguments.tensors) + difference)


def _checkpoint_export(arguments: argparse.Namespace) -> None:
    from dsmoe.checkpoint.show import one_checkpoint
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


def _checkpoint_import(arguments: argparse.Namespace) -> None:
    config = None if arguments.config is None else _load(arguments)
    from dsmoe.interop.importing import fitting_sections, import_folder

    if arguments.out is None:
        if arguments.config is not None:
            raise UserError("to write a checkpoint, say where as well: import FOLDER OUT --config CONFIG")
        print(fitting_sections(arguments.folder), end="")
        return
    if config is None:
        raise UserError("to write a checkpoint, give the run's YAML file: --config CONFIG")
    import_folder(arguments.folder, arguments.out, config, not arguments.no_check)


def _checkpoint_upcycle(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from dsmoe.interop.upcycle import upcycle

    upcycle(arguments.source, arguments.out, config, arguments.noise, not arguments.no_check)


def _checkpoint_verify(arguments: argparse.Namespace) -> None:
    from dsmoe.checkpoint.folder import verify
    from dsmoe.checkpoint.show import gigabytes, newest_checkpoint, not_listed
    from dsmoe.plan.text import quantity

    checkpoint = newest_checkpoint(arguments.path)
    manifest = verify(checkpoint)
    files = manifest.files
    size = sum(file.bytes for file in files.values())
    print(f"{checkpoint} is whole: {quantity(len(files), 'file')}, {gigabytes(size)}, every byte as it was written")
    for line in not_listed(checkpoint, manifest):
        print(line)
