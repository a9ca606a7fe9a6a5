"""What happens to files on disks and in copies: each way takes a file and a generator that draws where."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path


def read(path: Path) -> bytearray:
    return bytearray(path.read_bytes())


def flip_a_bit(path: Path, draw: random.Random) -> None:
    data = read(path)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut_off(path: Path, draw: random.Random) -> None:
    path.write_bytes(read(path)[: draw.randrange(path.stat().st_size)])


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(read(path) + draw.randbytes(draw.randint(1, 9)))


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def zeros(path: Path, draw: random.Random) -> None:
    """A block that a crash has left unwritten."""
    data = read(path)
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.choice([8, 512, 4096]))
    found = bytes(data[begin:end])
    data[begin:end] = bytes(end - begin) if any(found) else b"\xff" * (end - begin)
    path.write_bytes(data)


def exchange_within(path: Path, draw: random.Random) -> None:
    data = read(path)
    half = len(data) // 2
    first, second = data[:half], data[half : 2 * half]
    if first == second:
        second[0] ^= 1
    path.write_bytes(second + first + data[2 * half :])


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def make_a_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path, draw: random.Random) -> None:
    """Opened, it would be waited for without end."""
    path.unlink()
    os.mkfifo(path)


WAYS = [
    *[flip_a_bit] * 4,
    *(cut_off, lengthen, empty, zeros, exchange_within, remove, make_a_folder, make_a_pipe),
]
"""All leave other bytes than there were, or none."""


def outcomes_of(
    count: int,
    spoil: Callable[[random.Random], tuple[str, str]],
    use: Callable[[], object],
    refusal: type[Exception],
    is_clear: Callable[[str], bool],
) -> dict[str, list[str]]:
    """Spoil and use something so often, seeded, and sort what happens into refused, accepted and other.

    Args:
        count: how often.
        spoil: returns what it has done, and what a message about it has to name.
        use: fails with `refusal` where it sees that.
        refusal: any other error is one too many.
        is_clear: whether a message, besides naming it, is one for people.
    """
    found: dict[str, list[str]] = {"refused": [], "accepted": [], "other": []}
    for number in range(count):
        done, named = spoil(random.Random(number))
        what = f"{number}: {done}"
        try:
            use()
            found["accepted"].append(what)
        except refusal as error:
            said = str(error)
            found["refused" if named in said and is_clear(said) else "other"].append(f"{what}: {said}")
        except BaseException as error:  # Rust's panics are no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            found["other"].append(f"{what}: {error!r}")
    print({outcome: len(each) for outcome, each in found.items()})
    return found
