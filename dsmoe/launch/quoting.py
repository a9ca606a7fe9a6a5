"""Quoting: text for other languages, one function for each: a shell, DeepSpeed's shell over ssh, YAML, compose, Slurm.

Everything that `dsmoe launch` writes into a file, or prints to be pasted, passes one of these: it arrives unchanged,
and none of it is run as code. Text that a language cannot carry is refused, with the key that it came from.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable

import yaml

from dsmoe.config.errors import UserError
from dsmoe.config.paths import literal_path
from dsmoe.config.yaml_text import write_yaml

_UNSAFE_QUOTED = re.compile(r"[$`\\%]|[^\S ]")
"""Characters that a shell's double quotes, or pdsh, do not keep; white space."""
_UNSAFE_BARE = re.compile(rf"{_UNSAFE_QUOTED.pattern}|[|&;<>(){{}}\"']|^[~#]")
"""Characters that a shell, or pdsh, does not keep bare. `*`, `?` and brackets are kept if no file matches."""
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")
_SLURM = re.compile(r"[A-Za-z0-9_.,:=@\[\]-]+")


def shell_word(text: str, what: str) -> str:
    r"""Return one word of a shell's command line, on one line and printable.

    Unprintable characters are escaped for bash and zsh (`$'a\012b'`): a line break would end a comment.

    Args:
        text: the word. Bytes of a file name that are no UTF-8 are surrogates, as in Python.
        what: the key or the option that it came from, for the error.

    Raises:
        UserError: it has a null character, which no argument of a program can have.
    """
    _refuse(text, what, "\0", "a null character, which no path and no argument can have")
    return shlex.quote(text) if text.isprintable() else _escaped(text, str.isprintable)


def shell_command(words: Iterable[str], what: str = "an argument") -> str:
    """Return a command line of these words."""
    return " ".join(shell_word(word, what) for word in words)


def ssh_word(text: str, what: str) -> str:
    """Return one word that the `deepspeed` command passes on to the shells of other hosts.

    DeepSpeed 0.19.8 pastes it into a command for pdsh, which expands `%n`, and that into one for the hosts' shells:
    bare, or in double quotes if it has a space, with its double quotes escaped (launcher/multinode_runner.py:88).

    Raises:
        UserError: a shell would change it.
    """
    unsafe = _UNSAFE_QUOTED if " " in text else _UNSAFE_BARE
    return _unless(unsafe, text, what, "put the value into the YAML file")


def ssh_path(text: str, what: str) -> str:
    """Return a path that DeepSpeed pastes bare into the shells of other hosts, which with a space find nothing.

    Raises:
        UserError: a shell would take part of it for code.
    """
    _unless(_UNSAFE_BARE, text.replace(" ", ""), what, "give the folder another name")
    return text


def environment_value(text: str, what: str) -> str:
    """Return a value for DeepSpeed's file of environment variables, which a shell reads in double quotes, after pdsh.

    Raises:
        UserError: it has a line break, which ends a variable in that file, or a percent sign, which is pdsh's.
    """
    _refuse(text, what, "%\0\n\r", "a line break or a percent sign, which DeepSpeed's environment file cannot hold")
    return re.sub(r'([$`"\\])', r"\\\1", text)


def yaml_text(text: str, what: str) -> str:
    """Return a string of a YAML document, in double quotes and on one line.

    Raises:
        UserError: it is no Unicode text (a file name of other bytes).
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} ({text!r}) is not UTF-8, and YAML has no other text; rename it") from None
    return str(yaml.dump(text, default_style='"', allow_unicode=True, width=math.inf)).rstrip("\n")


def compose_text(text: str, what: str) -> str:
    """Return a string of a compose file, in which compose expands `$NAME`, and which has no null character."""
    _refuse(text, what, "\0", "a null character, which no path and no argument can have")
    return yaml_text(text.replace("$", "$$"), what)


def slurm_option(text: str, what: str) -> str:
    """Return the value of an option in an `#SBATCH` line, which has quoting rules of its own."""
    if not _SLURM.fullmatch(text):
        raise UserError(f"{what} ({text!r}) cannot be in an #SBATCH line: only letters, digits and . , : = @ [ ] _ -")
    return text


def slurm_folder(text: str, what: str) -> str:
    """Return a folder as a shell's word, for srun's patterns of file names (`%j` is the job's number).

    Raises:
        UserError: it has a backslash, after which srun expands none of its patterns.
    """
    _refuse(text, what, "\\", "a backslash, which srun's file names cannot have")
    return shell_word(path_argument(text), what)


def host_name(text: str, what: str) -> str:
    """Return a host's name unchanged, for bare use in commands and lists of hosts; UserError if it is none."""
    if not _HOST.fullmatch(text):
        raise UserError(f"{what}: {text!r} is not the name of a host: letters, digits and . : @ _ - make one")
    return text


def path_argument(path: str) -> str:
    """Return a path that no program takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def path_override(key: str, path: str) -> str:
    """Return `section.key=PATH` as a shell's word, to type as it is."""
    return shell_word(path_assignment(key, path), key)


def path_assignment(key: str, path: str) -> str:
    """Return `section.key=PATH` as a program's argument, in which the path is literal."""
    value = literal_path(path)
    text = write_yaml(value).removesuffix("\n").removesuffix("\n...")
    if "\n" in text:
        text = json.dumps(value)
    return f"{key}={text}"


def _escaped(text: str, keep: object) -> str:
    """`text` in `$'...'`, with three octal digits for each byte of the characters that `keep` rejects."""
    assert callable(keep)
    parts = (char if char not in "'\\" and keep(char) else _octal(char) for char in text)
    return f"$'{''.join(parts)}'"


def _octal(char: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))


def _unless(unsafe: re.Pattern[str], text: str, what: str, remedy: str) -> str:
    found = unsafe.search(text)
    if found or not text.isprintable():
        sign = found[0] if found else next(char for char in text if not char.isprintable())
        raise UserError(
            f"{what} ({text!r}) has {sign!r}, which DeepSpeed does not quote for the shells of other hosts; {remedy}, "
            "or start the run without ssh (`dsmoe launch CONFIG --slurm`, torchrun)"
        )
    return text


def _refuse(text: str, what: str, signs: str, why: str) -> None:
    if any(sign in text for sign in signs):
        raise UserError(f"{what} ({text!r}) has {why}; rename it")
