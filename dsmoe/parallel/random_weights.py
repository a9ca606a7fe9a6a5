"""Random weights that follow from a seed and a name: the same numbers for any number of ranks."""

from __future__ import annotations

import hashlib

import torch

from dsmoe.parallel.sharding import Shard


def seed_of(seed: int, *names: object) -> int:
    """Return a 63-bit seed that depends on `seed` and all `names` and on nothing else, on any machine."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def normal_from(seed: int, tensor: torch.Tensor, std: float, shard: Shard | None = None) -> None:
    """Fill `tensor` in place from N(0, std^2), with a generator of its own; leave a meta tensor alone.

    With a `shard` the whole weight is drawn and `tensor` gets its slice: the same numbers for any number of ranks.
    """
    if tensor.is_meta:
        return
    generator = torch.Generator(device=tensor.device).manual_seed(seed)
    shape = tensor.shape if shard is None else shard.whole_shape(tensor.shape)
    with torch.no_grad():
        # Drawn in fp32 whatever the dtype, so that bf16 weights are the rounded fp32 ones.
        whole = torch.empty(shape, dtype=torch.float32, device=tensor.device).normal_(0.0, std, generator=generator)
        tensor.copy_(whole if shard is None else shard.slice_of(whole))


def uniform_from(seed: int, tensor: torch.Tensor, bound: float) -> None:
    """Fill `tensor` in place from U(-bound, bound), as torch's linear layers are (bound: one over the root of D)."""
    if not tensor.is_meta:
        generator = torch.Generator(device=tensor.device).manual_seed(seed)
        with torch.no_grad():
            tensor.uniform_(-bound, bound, generator=generator)
