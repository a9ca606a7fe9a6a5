"""Which text is held out for validation: whole documents chosen by hash, or the end of a single one.

A document's hash depends on its text and `data.seed` alone, so that nearly all sources hold out the same documents.
"""

from __future__ import annotations

import numpy as np

NEAR = 0.1
"""How far the held-out part of a source's bytes may be from the fraction, relative to the smaller part."""


def hash_limit(fraction: float) -> int:
    """Below which a document's hash is, of uint64, if its hash alone holds it out."""
    return round(fraction * 2**64)


def choose_validation(hashes_D: np.ndarray, bytes_D: np.ndarray, fraction: float) -> np.ndarray:
    """Choose held-out documents: those of the lowest hashes, and where the sizes allow the same ones in every source.

    Those are the documents whose hash is below `hash_limit(fraction)`: in a source of thousands of documents they have
    nearly `fraction` of the bytes. Where they have a tenth more or less, the documents are held out in the order of
    their hashes until they have `fraction` of the bytes. A text so large that most of the corpus would be held out with
    it (beyond halfway from `fraction` to everything) then stays in training. What such a source holds out and others
    would train on, or the other way round, `dsmoe.data.held_out_overlap` finds.

    Equal hashes are equal texts and stay together, so no text is on both sides.

    Args:
        hashes_D: `[documents]` uint64, of the texts.
        bytes_D: `[documents]` int64, sizes of the texts.
        fraction: part of all bytes to hold out, in (0, 1).

    Returns:
        `[documents]` bool, true for validation: at least one, if two texts differ.
    """
    below_D = hashes_D < np.uint64(min(hash_limit(fraction), 2**64 - 1))
    missed = abs(int(bytes_D[below_D].sum()) - fraction * int(bytes_D.sum()))
    is_near = missed <= NEAR * min(fraction, 1 - fraction) * int(bytes_D.sum())
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
    """Cut `text` in two, the second part about `fraction` of its bytes: after a line, else after a space.

    To find one, the second part may grow to twice that size; text without a line end or space there is
    cut between two characters.
    """
    data = text.encode("utf-8")
    size = max(1, round(fraction * len(data)))
    latest = len(data) - size
    earliest = max(0, latest - size)
    cut = data.rfind(b"\n", earliest, latest) + 1 or data.rfind(b" ", earliest, latest) + 1 or latest
    while data[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return data[:cut].decode("utf-8"), data[cut:].decode("utf-8")
