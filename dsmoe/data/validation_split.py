"""Validation split: hold out whole documents chosen by hash, or the end of a single document.

A document's hash depends on its text and `data.seed` alone, so that nearly all sources hold out the same documents.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 0.1
"""Tolerance of the held-out share of a source's bytes, relative to the smaller of the two parts."""


def hash_limit(fraction: float) -> int:
    """Return the limit below which a document's uint64 hash holds it out: `fraction` of all hashes are below."""
    return round(fraction * 2**64)


def choose_validation(hashes_D: np.ndarray, bytes_D: np.ndarray, fraction: float) -> np.ndarray:
    """Choose the held-out documents: those with the lowest hashes, where the sizes allow the same ones in every source.

    These are the documents with a hash below `hash_limit(fraction)`: in a source of thousands of documents they have
    nearly `fraction` of the bytes. If they miss `fraction` by more than `TOLERANCE`, the documents are instead held out
    in the order of their hashes until they have `fraction` of the bytes. A text with which more than
    (1 + fraction) / 2 of the corpus would be held out then stays in training. `dsmoe.data.held_out_overlap` finds the
    documents in which such a source differs from the others.

    Equal hashes are equal texts and stay together, so no text is on both sides. With fraction 0.25 and hashes as parts
    of 2^64:

        hash    0.10  0.20  0.60  0.90        hash    0.10  0.40  0.60  0.90
        bytes     10    15    40    35        bytes     10    20    40    30
        below the limit: 25 of 100 bytes      below the limit: 10 of 100 bytes, too few
        held out: 0.10 and 0.20               held out by order: 0.10 and 0.40, 30 of 100 bytes

    Args:
        hashes_D: `[documents]` uint64 hashes of the texts.
        bytes_D: `[documents]` int64 sizes of the texts.
        fraction: part of all bytes to hold out, in (0, 1).

    Returns:
        `[documents]` bool, true for validation: at least one, if two texts differ.
    """
    below_D = hashes_D < np.uint64(min(hash_limit(fraction), 2**64 - 1))
    missed = abs(int(bytes_D[below_D].sum()) - fraction * int(bytes_D.sum()))
    is_near = missed <= TOLERANCE * min(fraction, 1 - fraction) * int(bytes_D.sum())
    if is_near and below_D.any() and not below_D.all():
        return below_D
    _, text_D = np.unique(hashes_D, return_inverse=True)  # numbered in the order of their hashes
    bytes_of_text = np.bincount(text_D, weights=bytes_D)
    total = bytes_of_text.sum()
    held_out = np.zeros(len(bytes_of_text), dtype=bool)
    held_out_bytes = 0.0
    for text, size in enumerate(bytes_of_text):
        if held_out_bytes >= fraction * total:
            break
        if held_out_bytes + size <= (1 + fraction) / 2 * total:
            held_out[text] = True
            held_out_bytes += size
    return held_out[text_D]


def cut_single_document(text: str, fraction: float) -> tuple[str, str]:
    """Cut `text` in two, the second part with about `fraction` of the bytes: after a line, else after a space.

    To end the first part at a line or space, the second part may grow to twice that size; without either, the cut is
    between two characters.
    """
    data = text.encode("utf-8")
    size = max(1, round(fraction * len(data)))
    latest = len(data) - size
    earliest = max(0, latest - size)
    cut = data.rfind(b"\n", earliest, latest) + 1 or data.rfind(b" ", earliest, latest) + 1 or latest
    while data[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return data[:cut].decode("utf-8"), data[cut:].decode("utf-8")
