"""What a deliberate mistake is."""

from __future__ import annotations

from dataclasses import dataclass

WRONG = r"^E +(AssertionError|assert |Failed: DID NOT RAISE|ValueError: (not enough|too many) values to unpack)"
"""An assertion failed, in the test or on one of its ranks: it came to a wrong result, and did not crash or hang; or
what should have been refused was not."""
REFUSED = r"^E +dsmoe\.\S+Error: "
"""What is right was refused."""
WAITS = r"did not end within|[Tt]imed out|[Tt]imeout"
"""The same where what a mistake does is to let something wait for ever, or not to wait: only time shows that."""


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in `file`, becomes `new`; then `caught_by` fails."""

    mistake: str
    file: str
    old: str
    new: str
    caught_by: str
    shown_by: str = WRONG
    """A pattern of what the test then says."""
