"""`manifest.json`: the facts of a checkpoint, its tensors, and the size and checksum of each of its files. No torch.

A folder is a whole checkpoint exactly if it has a manifest that agrees with its own checksum, and the files that the
manifest lists, as they were written. Whatever else is in the folder is never read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import randbits
from typing import Any

from dsmoe.checkpoint.headers import BYTES, FLOATS, LARGEST, are_sizes
from dsmoe.config.errors import UserError, exit_code_of
from dsmoe.config.yaml_text import MAX_DEPTH
from dsmoe.plan.text import shown
from dsmoe.runtime.atomic_files import NotAFileError, check_regular, not_a_file
from dsmoe.runtime.checksummed_json import has_valid_checksum, json_with_checksum

MANIFEST = "manifest.json"
FORMAT = "dsmoe checkpoint 2"
_FILE_NAME = re.compile(r"rank_\d{5,}_\d{3,}\.safetensors", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_PRIME = (1 << 127) - 1
_TABLES = ("files", "tensors")
_TYPES = {"model": FLOATS, "exp_avg": ("F32",), "exp_avg_sq": ("F32",), "step": ("F32",), "rng": ("U8",)}
"""The types that a tensor may have, by its kind; those of buffers are the model's."""
_MOST_LEVELS = MAX_DEPTH + 10
"""Bound of the facts' depth: a config is YAML of at most `MAX_DEPTH` levels. Deeper ones exhaust Python's stack."""


class DamagedError(UserError):
    """A checkpoint that is not what was written, with the name of the file."""


class UnreadableError(DamagedError):
    """A checkpoint that cannot be read now and may be whole: nothing is concluded from it until it can."""

    @classmethod
    def from_error(cls, path: str | Path, error: OSError) -> UnreadableError:
        """Return the error for a file, with the exit code that the system's error calls for."""
        unreadable = cls(f"cannot read {path}: {error.strerror}")
        unreadable.exit_code = exit_code_of(error)
        return unreadable


class ContradictionError(ValueError):
    """A contradiction in a manifest whose checksum is right: a program, or a person, wrote it so."""


@dataclass(frozen=True)
class Facts:
    """Everything a checkpoint records besides its tensors."""

    step: int
    """Optimizer steps done. The order of the data follows from it and the seed."""
    tokens: int
    """Tokens trained on."""
    skipped_steps: int
    """Steps that were not taken because gradients were not finite."""
    schedule_step: int
    """Position in the learning-rate schedule, which a skipped step does not advance."""
    validation_loss: float | None
    """Held-out loss of an evaluation after this very step."""
    optimizer: str
    config: dict[str, Any]
    """The run's config, resolved."""
    layout: dict[str, Any]
    """Layout of the ranks that wrote it. Any other reads it; random states are those of ranks of this one."""
    versions: dict[str, str]
    corpora: dict[str, list[int]] = field(default_factory=dict)
    """By source, the numbers of tokens and of bytes of its training text."""
    order: dict[str, Any] = field(default_factory=dict)
    """The order of the training text, as `dsmoe.train.changed` compares it; empty where it was not recorded."""
    held_out: str = ""
    """Names the text that the evaluation read: losses of two texts do not compare."""


@dataclass(frozen=True)
class StoredFile:
    """Size and checksum of a file."""

    bytes: int
    xxh128: str
    """Checksum of the whole file, XXH3 of 128 bits: as `xxhsum -H2` prints it."""


@dataclass(frozen=True)
class StoredChunk:
    """A box of a global tensor, and the place of its elements on the disk."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    """In bytes, from the beginning of the file."""


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor: the chunks tile it."""

    dtype: str
    """Type as in safetensors files: `F32`, `BF16`, `U8`."""
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The contents of a `manifest.json`."""

    facts: Facts
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]

    def text(self) -> str:
        """Return the contents of the file, a line per entry."""
        content: dict[str, Any] = {"format": FORMAT, "facts": asdict(self.facts)}
        content["files"] = {name: asdict(file) for name, file in sorted(self.files.items())}
        content["tensors"] = {
            key: [tensor.dtype, tensor.shape, [[c.start, c.shape, c.file, c.offset] for c in tensor.chunks]]
            for key, tensor in sorted(self.tensors.items())
        }
        return _sealed(content)

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """Return the manifest of a folder.

        Raises:
            DamagedError: the manifest is missing, or not what was written.
            UnreadableError: it cannot be read now.
        """
        path = checkpoint / MANIFEST
        try:
            check_regular(path)
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            if content.get("format") != FORMAT:
                raise DamagedError(f"{path} is of another format: {content.get('format')!r}, not {FORMAT!r}")
            # Before anything is made of the contents: what is wrong after this was written so.
            if not has_valid_checksum(text, content, _TABLES):
                raise ValueError
            if content.keys() != {"format", "facts", "files", "tensors", "sha256"}:
                raise ContradictionError(f"its entries are {', '.join(content)}")
            manifest = cls(
                _facts(content["facts"]),
                {name: _file(name, file) for name, file in content["files"].items()},
                {key: _tensor(key, entry) for key, entry in content["tensors"].items()},
            )
            # Now that files and tensors are both of their types, they can be compared.
            manifest._check()
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedError(f"{checkpoint} is not a whole checkpoint: {path} is missing") from None
        except (NotAFileError, IsADirectoryError) as error:
            raise DamagedError(f"{checkpoint} is not a whole checkpoint: {path} {not_a_file(error)}") from None
        except OSError as error:
            raise UnreadableError.from_error(path, error) from None
        except ContradictionError as error:
            raise DamagedError(f"{path} is damaged: {shown(str(error))}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DamagedError(f"{path} is damaged: it is not what was written") from None
        return manifest

    def bytes_of(self, *kinds: str) -> int:
        """Return the size of all tensors of these kinds (`model`, `exp_avg`...)."""
        return sum(
            tensor.elements * BYTES[tensor.dtype]
            for key, tensor in self.tensors.items()
            if key.partition("/")[0] in kinds
        )

    def _check(self) -> None:
        """Raise ContradictionError where tensors and files, or weights and moments, do not go together."""
        for key, tensor in self.tensors.items():
            kind, _, name = key.partition("/")
            if kind == "model" and tensor.dtype != "F32" and f"exp_avg/{name}" in self.tensors:
                raise ContradictionError(f"{key} is {tensor.dtype}, and what has moments is saved as F32")
            # A wrong offset would load other elements without an error: everything is checked before anything is read.
            for chunk in tensor.chunks:
                if chunk.file not in self.files:
                    raise ContradictionError(f"{key} is in {chunk.file!r}, which is none of its files")
                # Python integers: no product overflows, however wrong the numbers are.
                end = chunk.offset + math.prod(chunk.shape) * BYTES[tensor.dtype]
                if end > self.files[chunk.file].bytes:
                    raise ContradictionError(f"{key} ends behind the end of {chunk.file}")
            if not tiles(tensor.shape, [(chunk.start, chunk.shape) for chunk in tensor.chunks]):
                raise ContradictionError(f"the boxes of {key} do not have every element of it once")


def is_own_file(name: str) -> bool:
    """Return whether a checkpoint's file may have this name."""
    return name == MANIFEST or _FILE_NAME.fullmatch(name) is not None


def chunk_name(key: str, start: Iterable[int]) -> str:
    """Name a chunk within its file, by its first index: `exp_avg/blocks.1.ffn.up.weight[128,0]`."""
    return f"{key}[{','.join(map(str, start))}]"


def tiles(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Return whether boxes, (start, shape) each, cover a tensor of `shape`, every element once.

    In linear time. Give every coordinate a random weight, and an element the product of its coordinates' weights: the
    boxes' elements weigh as much as the tensor's exactly if each is there once, but for a chance of some 2^-120
    (Schwartz 1980, Zippel 1979: two different polynomials seldom agree in a random point). A box weighs the product
    of its sides, and a side is a difference of running sums, of which only those at the ends of boxes are needed.
    """
    for start, size in boxes:
        if not len(start) == len(size) == len(shape):
            return False
        if any(
            first < 0 or part < 1 or first + part > whole for first, part, whole in zip(start, size, shape, strict=True)
        ):
            return False
    # A tensor of 3 x 2 cut behind its first row; running sums 0, a, b at rows 0, 1, 3 and 0, c at columns 0, 2:
    #   box (0, 0), (1, 2)        (a - 0) (c - 0) =         a c
    #   box (1, 0), (2, 2)        (b - a) (c - 0) = b c - a c
    #   the tensor (0, 0), (3, 2) (b - 0) (c - 0) = b c, the sum of both
    # A second box of (1, 1), (2, 1) would need a sum d at column 1, and b c would not come out.
    sums: list[dict[int, int]] = [{0: 0} for _ in shape]

    def weight(start: tuple[int, ...], size: tuple[int, ...]) -> int:
        product = 1
        for known, first, part in zip(sums, start, size, strict=True):
            for end in (first, first + part):
                if end not in known:
                    # Below the prime, and drawn anew at each call: no file can be made to fit them.
                    known[end] = randbits(126)
            # Modulo a prime, where a product is 0 only if a factor is.
            product = product * (known[first + part] - known[first]) % _PRIME
        return product

    total = sum(weight(start, size) for start, size in boxes) % _PRIME
    return total == weight((0,) * len(shape), shape)


def _facts(entry: dict[str, Any]) -> Facts:
    """Return the facts, each of its type; a field that this version does not know, or lacks, raises TypeError.

    Raises:
        ContradictionError: no checkpoint of dsmoe's has such facts.
    """
    if _is_deeper(entry, _MOST_LEVELS):
        raise ContradictionError(f"its facts are more than {_MOST_LEVELS} levels deep")
    facts = Facts(**entry)
    counts = {name: getattr(facts, name) for name in ("step", "tokens", "skipped_steps", "schedule_step")}
    wrong = [name for name, value in counts.items() if not are_sizes([value])]
    kinds = {"optimizer": str, "config": dict, "layout": dict, "versions": dict, "corpora": dict}
    kinds |= {"order": dict, "held_out": str}
    wrong += [name for name, kind in kinds.items() if type(getattr(facts, name)) is not kind]
    loss = facts.validation_loss
    if loss is not None and not (type(loss) in (int, float) and math.isfinite(loss) and loss >= 0):
        wrong.append("validation_loss")
    if not wrong and not all(are_sizes(sizes) for sizes in facts.corpora.values()):
        wrong.append("corpora")
    sections = ("model", "train") if "config" not in wrong else ()
    wrong += [f"config.{name}" for name in sections if type(facts.config.get(name)) is not dict]
    if "config" not in wrong and type(facts.config.get("name")) is not str:
        wrong.append("config.name")
    if wrong:
        raise ContradictionError(f"its facts have no such value: {', '.join(wrong)}")
    if contradictions := list(_contradictions(facts)):
        raise ContradictionError(f"its facts contradict each other: {'; '.join(contradictions)}")
    return facts


def _contradictions(facts: Facts) -> Iterator[str]:
    """Yield counts that no run has together: each step is taken, which advances the schedule, or skipped."""
    step, skipped, taken = facts.step, facts.skipped_steps, facts.schedule_step
    if skipped + taken != step:
        yield f"schedule_step is {taken} and skipped_steps {skipped}, which make {skipped + taken}, and step is {step}"
    batch = facts.config["train"].get("batch_tokens")
    if type(batch) is int and facts.tokens != step * batch:
        yield f"tokens is {facts.tokens}, and {step} steps of config.train.batch_tokens ({batch}) are {step * batch}"


def _is_deeper(value: object, most: int) -> bool:
    """Return whether there are more than `most` levels of mappings and lists; without recursion."""
    level = [value]
    # Level by level: recursion would need the stack that deep nesting exhausts.
    for _ in range(most + 1):
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True


def _file(name: str, entry: dict[str, Any]) -> StoredFile:
    file = StoredFile(**entry)
    if not (_FILE_NAME.fullmatch(name) and are_sizes([file.bytes]) and _CHECKSUM.fullmatch(file.xxh128)):
        raise ContradictionError(f"it has no such file: {name!r} {entry}")
    return file


def _tensor(key: str, entry: list[Any]) -> StoredTensor:
    dtype, shape, chunks = entry
    if dtype not in BYTES or not are_sizes(shape, 1) or math.prod(shape) * BYTES[dtype] >= LARGEST:
        raise ContradictionError(f"no tensor is as {key} is there: {str(dtype)[:20]!r} {str(shape)[:80]}")
    kind = key.partition("/")[0]
    if dtype not in _TYPES.get(kind, BYTES):
        raise ContradictionError(f"{key} is {dtype}, and {kind} is saved as {' or '.join(_TYPES[kind])}")
    for start, size, file, offset in chunks:
        if not (are_sizes(start) and are_sizes(size, 1) and type(file) is str and are_sizes([offset])):
            raise ContradictionError(f"no box is as one of {key} is there: {str([start, size, file, offset])[:100]}")
        if not len(start) == len(size) == len(shape):
            raise ContradictionError(f"a box of {key} has {len(size)} dimensions, and the tensor {len(shape)}")
    stored = tuple(StoredChunk(tuple(start), tuple(size), file, offset) for start, size, file, offset in chunks)
    return StoredTensor(dtype, tuple(shape), stored)


def _sealed(content: dict[str, Any]) -> str:
    return json_with_checksum(content, _TABLES)
