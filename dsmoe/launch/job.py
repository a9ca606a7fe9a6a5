"""What all launchers have in common: what is asked for, and what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe.config.dump import flatten
from dsmoe.config.errors import UserError, describe, system_error
from dsmoe.config.load import included_files, read_as_written
from dsmoe.config.paths import depends_on_host, paths_as_written, variables_in
from dsmoe.config.schema import Config
from dsmoe.launch.quoting import path_argument, shell_command, shell_word, ssh_path, ssh_word
from dsmoe.plan.plan import Plan
from dsmoe.runtime.atomic_files import write_whole


def default_folder(config: Config) -> str:
    """Where the files of a run go unless another folder is named: two runs do not share one."""
    return f"launch/{config.name}"


@dataclass(frozen=True)
class Request:
    """A run that is to be started: its plan, and what was typed to name it."""

    plan: Plan
    path: str
    """The YAML file, as it was typed."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, as typed; part of `config` already."""
    folder: str = ""
    """Where the files will be, as it is typed from the folder in which `dsmoe launch` is run."""

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.plan.config

    def program(self, name: str = "pretrain") -> str:
        """`launch/pretrain.py` and its arguments, on a shell's command line; by its full path in other folders."""
        return shell_command(self.words(name))

    def program_over_ssh(self) -> str:
        """The same for the `deepspeed` command, which goes to other hosts by ssh.

        Raises:
            UserError: DeepSpeed would not hand it on as it is.
        """
        script, option, path, *overrides = self.words("pretrain")
        ssh_path(script, "the path of dsmoe's launch/pretrain.py")
        ssh_word(path, "the path of the config")
        for override in overrides:
            ssh_word(override, f"the override of {override.partition('=')[0].strip()}")
        return shell_command([script, option, path, *overrides])

    def words(self, name: str) -> list[str]:
        """The words of that command."""
        script = Path(f"launch/{name}.py")
        there = script if script.exists() else Path(__file__).parents[2] / script
        return [str(there), "--config", path_argument(self.path), *self.overrides]

    def paths_of_host(self) -> dict[str, str]:
        """The config's paths, by key, whose text has `~` or a variable: what they are on this host."""
        resolved = flatten(self.config.model_dump())
        return {key: resolved[key] for key, text in self._written_paths().items() if depends_on_host(text)}

    def variables(self) -> list[str]:
        """The names of the environment's variables that the config's paths and its includes have."""
        texts = [*self._written_paths().values(), *(text for text, _ in included_files(Path(self.path)))]
        return sorted({name for text in texts for name in variables_in(text)})

    def _written_paths(self) -> dict[str, str]:
        return paths_as_written(read_as_written(self.path, self.overrides)[0])

    def path_of(self, name: str) -> str:
        """One of the files, as the command names it."""
        return shell_word(path_argument(str(Path(self.folder) / name)), "--out")

    def written_by(self, way: str) -> str:
        """The command that writes the files again: `way` is `--hostfile`, `--slurm` or `--docker`."""
        out = [] if self.folder == default_folder(self.config) else ["--out", path_argument(self.folder)]
        return shell_command(["dsmoe", "launch", path_argument(self.path), *self.overrides, way, *out])


@dataclass(frozen=True)
class Job:
    """Files that start a run with one launcher, and the command to type when they are there."""

    files: Mapping[str, str]
    """Text by file name, in one folder."""
    command: str
    """To be typed in the folder from which `dsmoe launch` was run."""
    warning: str = ""
    """What has to be done first, if anything."""
    executable: frozenset[str] = field(default=frozenset())
    """The files that are run by their name."""

    def write(self, folder: Path) -> list[Path]:
        """Write the files, whole or not at all each; returns their paths.

        Raises:
            UserError: one of them is there with other text, which somebody may have put in, or cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = {folder / name: text for name, text in self.files.items()}
            edited = [str(path) for path, text in paths.items() if path.exists() and path.read_bytes() != text.encode()]
            if edited:
                raise UserError(
                    f"{', '.join(edited)}: exists, with other text than would be written; remove it if nothing in it "
                    f"is yours, or name another folder: --out DIR"
                )
            for path, text in paths.items():
                write_whole(path, text, 0o755 if path.name in self.executable else 0o644)
        except OSError as error:
            advice = "name another folder: --out DIR"
            raise system_error(f"cannot write {describe(error)}; {advice}", error) from None
        return list(paths)
