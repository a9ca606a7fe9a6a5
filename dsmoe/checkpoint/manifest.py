"""`manifest.json`: what a checkpoint is, and the size and checksum of each of its files. No torch.

A folder is a whole checkpoint exactly if it has a manifest that agrees with its own checksum, the files that the
manifest lists, as they were written, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from dsmoe.config.errors import UserError, exit_code_of
from dsmoe.config.sealed import sealed_json

MANIFEST = "manifest.json"
FORMAT = "dsmoe checkpoint 2"
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Size of an element by the dtype's name in safetensors files."""
_DROPPED = re.compile(
    r"\.nfs[0-9a-f]+|\.fuse_hidden\w+|\..*\.sw[a-p]|\.#.*|#.*#|.*~|\.DS_Store|\._.*|Thumbs\.db", re.ASCII
)
"""What systems and editors leave beside files that are looked at: no reason to take a checkpoint for damaged."""
_FILE_NAME = re.compile(r"rank_\d{5,}_\d{3,}\.safetensors")


class DamagedError(UserError):
    """A checkpoint that is not what was written, with the name of the file."""


class UnreadableError(DamagedError):
    """A checkpoint that cannot be read now and may be whole: nothing is made of it until it can."""

    @classmethod
    def of(cls, path: str | Path, error: OSError) -> UnreadableError:
        """That of a file, with the exit code of what the system says."""
        unreadable = cls(f"cannot read {path}: {error.strerror}")
        unreadable.exit_code = exit_code_of(error)
        return unreadable


@dataclass(frozen=True)
class StoredFile:
    """What a file should be."""

    bytes: int
    xxh128: str
    """Checksum of all of it, XXH3 of 128 bits: as `xxhsum -H2` prints it."""


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor, and where its elements are."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    """In bytes, from the beginning of the file."""


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor: the boxes tile it."""

    dtype: str
    """As in safetensors files: `F32`, `BF16`, `U8`."""
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint besides its tensors."""

    step: int
    """Optimizer steps done. The order of the data follows from it and the seed."""
    tokens: int
    """Tokens trained on."""
    skipped_steps: int
    """Steps that were not taken because gradients were not finite."""
    schedule_step: int
    """Where the learning-rate schedule is: a skipped step does not advance it."""
    validation_loss: float | None
    """Of an evaluation after this very step."""
    optimizer: str
    config: dict[str, Any]
    """The run's, resolved."""
    layout: dict[str, Any]
    """Of the ranks that wrote it. Any other reads it; random states are those of ranks of this one."""
    versions: dict[str, str]
    corpora: dict[str, list[int]] = field(default_factory=dict)
    """By source, how many tokens and bytes of training text it had."""
    order: dict[str, Any] = field(default_factory=dict)
    """The order of the training text, as `dsmoe.train.changed` compares it; empty where it was not recorded."""
    held_out: str = ""
    """Names the text that the evaluation read: losses of others are not to be compared."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a `manifest.json`."""

    facts: Facts
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]

    def text(self) -> str:
        """The file's contents, a line per entry."""
        content: dict[str, Any] = {"format": FORMAT, "facts": asdict(self.facts)}
        content["files"] = {name: asdict(file) for name, file in sorted(self.files.items())}
        content["tensors"] = {
            key: [tensor.dtype, tensor.shape, [[box.start, box.shape, box.file, box.offset] for box in tensor.boxes]]
            for key, tensor in sorted(self.tensors.items())
        }
        return _sealed(content)

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """That of a folder.

        Raises:
            DamagedError: it is missing, or not what was written.
        """
        path = checkpoint / MANIFEST
        try:
            text = path.read_text()
            content = json.loads(text)
            if content.get("format") != FORMAT:
                raise DamagedError(f"{path} is of another format: {content.get('format')!r}, not {FORMAT!r}")
            if _sealed({key: value for key, value in content.items() if key != "sha256"}) != text:
                raise ValueError
            manifest = cls(
                Facts(**content["facts"]),
                {name: StoredFile(**file) for name, file in content["files"].items()},
                {key: _tensor(*entry) for key, entry in content["tensors"].items()},
            )
            manifest._check()
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedError(f"{checkpoint} is not a whole checkpoint: {path} is missing") from None
        except OSError as error:
            raise UnreadableError.of(path, error) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DamagedError(f"{path} is damaged: it is not what was written") from None
        return manifest

    def bytes_of(self, *kinds: str) -> int:
        """Size of all tensors of these kinds (`model`, `exp_avg`...)."""
        return sum(
            tensor.elements * BYTES[tensor.dtype]
            for key, tensor in self.tensors.items()
            if key.partition("/")[0] in kinds
        )

    def _check(self) -> None:
        """Raise ValueError where the manifest contradicts itself."""
        if not all(_FILE_NAME.fullmatch(name) for name in self.files):
            raise ValueError
        for tensor in self.tensors.values():
            for box in tensor.boxes:
                end = box.offset + math.prod(box.shape) * BYTES[tensor.dtype]
                if box.offset < 0 or end > self.files[box.file].bytes:
                    raise ValueError
            if not tiles(tensor.shape, [(box.start, box.shape) for box in tensor.boxes]):
                raise ValueError


def check_files(checkpoint: Path, manifest: Manifest) -> None:
    """Check that the folder has the manifest's files, of their sizes, and nothing else; reads no file.

    Raises:
        DamagedError: it has not.
    """
    try:
        there = {
            path.name: path.stat().st_size
            for path in checkpoint.iterdir()
            if path.name != MANIFEST and not _DROPPED.fullmatch(path.name)
        }
    except (FileNotFoundError, NotADirectoryError) as error:  # a run may be removing it
        raise DamagedError(f"cannot read {error.filename}: {error.strerror}") from None
    except OSError as error:
        raise UnreadableError.of(error.filename, error) from None
    for name in sorted(manifest.files.keys() | there.keys()):
        path = checkpoint / name
        if name not in manifest.files:
            raise DamagedError(f"{path} is not part of the checkpoint: something else has put it there")
        if name not in there:
            raise DamagedError(f"{path} is missing")
        if there[name] != manifest.files[name].bytes:
            raise DamagedError(f"{path} has {there[name]:,} bytes instead of {manifest.files[name].bytes:,}")


def check_contents(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check that the files called `names` have the manifest's checksums; reads all of them.

    Raises:
        DamagedError: one has not.
    """
    for name in names:
        path = checkpoint / name
        try:
            with path.open("rb", buffering=0) as stream:
                found = hashlib.file_digest(stream, xxh3_128).hexdigest()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DamagedError(f"cannot read {path}: {error.strerror}") from None
        except OSError as error:
            raise UnreadableError.of(path, error) from None
        if found != manifest.files[name].xxh128:
            raise DamagedError(f"{path} is damaged: it is not what was written")


def tiles(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes, (start, shape) each, cover a tensor of `shape`, every element once."""
    if sum(math.prod(size) for _, size in boxes) != math.prod(shape):
        return False
    for start, size in boxes:
        if not len(start) == len(size) == len(shape):
            return False
        if any(
            first < 0 or part < 1 or first + part > whole for first, part, whole in zip(start, size, shape, strict=True)
        ):
            return False
    return not any(True for _ in _overlapping(boxes))


def _overlapping(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Iterator[tuple[int, int]]:
    """Pairs of boxes that have an element in common, by their places in the order of their first rows."""
    ordered = sorted(boxes)
    open_: list[int] = []
    for place, (start, size) in enumerate(ordered):
        if start:
            open_ = [i for i in open_ if ordered[i][0][0] + ordered[i][1][0] > start[0]]
        for i in open_:
            if all(a < d + e and d < a + b for a, b, d, e in zip(start, size, *ordered[i], strict=True)):
                yield i, place
        open_.append(place)


def _tensor(dtype: str, shape: list[int], boxes: list[list[Any]]) -> StoredTensor:
    stored = tuple(StoredBox(tuple(start), tuple(size), file, offset) for start, size, file, offset in boxes)
    return StoredTensor(dtype, tuple(shape), stored)


def _sealed(content: dict[str, Any]) -> str:
    return sealed_json(content, tables=("files", "tensors"))
