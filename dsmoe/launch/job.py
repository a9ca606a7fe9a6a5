"""Job: the request for a run, and the files and the command that start it, for all launchers."""

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
    """Return the folder of a run's files unless another one is named: two runs do not share one."""
    return f"launch/{config.name}"


@dataclass(frozen=True)
class Request:
    """A run to start: its plan, and the arguments that were typed."""

    plan: Plan
    path: str
    """The YAML file, as it was typed."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, as typed; `config` includes them."""
    folder: str = ""
    """The folder for the files, relative to the one in which `dsmoe launch` is run."""

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.plan.config

    def program(self, name: str = "pretrain") -> str:
        """Return `launch/pretrain.py` and its arguments for a shell; by its full path in other folders."""
        return shell_command(self.words(name))

    def program_over_ssh(self) -> str:
        """Return the same for the `deepspeed` command, which takes it to other hosts by ssh.

        Raises:
            UserError: DeepSpeed would change it on the way.
        """
        script, option, path, *overrides = self.words("pretrain")
        ssh_path(script, "the path of dsmoe's launch/pretrain.py")
        ssh_word(path, "the path of the config")
        for override in overrides:
            ssh_word(override, f"the override of {override.partition('=')[0].strip()}")
        return shell_command([script, option, path, *overrides])

    def words(self, name: str) -> list[str]:
        """Return the words of the command of `program`."""
        script = Path(f"launch/{name}.py")
        found = script if script.exists() else Path(__file__).parents[2] / script
        return [str(found), "--config", path_argument(self.path), *self.overrides]

    def paths_of_host(self) -> dict[str, str]:
        """Return the config's paths with `~` or a variable, as they are on this host, by key."""
        resolved = flatten(self.config.model_dump())
        return {key: resolved[key] for key, text in self._written_paths().items() if depends_on_host(text)}

    def variables(self) -> list[str]:
        """Return the names of the variables in the config's paths and in its includes."""
        texts = [*self._written_paths().values(), *(text for text, _ in included_files(Path(self.path)))]
        return sorted({name for text in texts for name in variables_in(text)})

    def _written_paths(self) -> dict[str, str]:
        return paths_as_written(read_as_written(self.path, self.overrides)[0])

    def path_of(self, name: str) -> str:
        """Return the path of one of the files as a shell's word."""
        return shell_word(path_argument(str(Path(self.folder) / name)), "--out")

    def written_by(self, option: str) -> str:
        """Return the command that writes the files again: `option` is `--hostfile`, `--slurm` or `--docker`."""
        out = [] if self.folder == default_folder(self.config) else ["--out", path_argument(self.folder)]
        return shell_command(["dsmoe", "launch", path_argument(self.path), *self.overrides, option, *out])


@dataclass(frozen=True)
class Job:
    """The files that start a run with one launcher, and the command to type once they are written."""

    files: Mapping[str, str]
    """The text of each file, by its name; all in one folder."""
    command: str
    """The command, for the folder in which `dsmoe launch` was run."""
    warning: str = ""
    """A thing to do before, if any."""
    executable: frozenset[str] = field(default=frozenset())
    """The files to make executable."""

    def write(self, folder: Path) -> list[Path]:
        """Write the files, each whole or not at all, and return their paths.

        Raises:
            UserError: a file exists with other text, which may be somebody's, or cannot be written.
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
