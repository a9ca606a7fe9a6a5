"""Claims that every rank of a run must share: its settings, its code and its data."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path

from dsmoe.config.dump import flatten
from dsmoe.config.paths import is_path
from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource
from dsmoe.data.tokenizer import tokenizer_digest
from dsmoe.train.environment import package_version

PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "datasets", "pyarrow")
"""Packages of which another version may compute, read or exchange something else."""


def run_fingerprint(config: Config) -> dict[str, str]:
    """The resolved config key by key, what the tokenizer is, and what runs it.

    Nodes may have files and folders in places of their own, so no path is among them. What is there is: the text in
    `data_fingerprint`. The run folder is compared by a file in it (`check_shared`), and the checkpoint to begin with is
    the one that rank 0 names.
    """
    packages = {name: package_version(name) or "not installed" for name in PACKAGES}
    source = {"dsmoe's source": _source_digest()}
    tree = flatten(config.model_dump(mode="json"))
    settings = {key: json.dumps(value) for key, value in tree.items() if not is_path(key, value)}
    tokenizer = {"data.tokenizer, its contents": tokenizer_digest(config) or f"no file {config.data.tokenizer}"}
    return {**settings, **tokenizer, "python": platform.python_version(), **packages, **source}


def data_fingerprint(sources: Sequence[PreparedSource]) -> dict[str, str]:
    """Token counts and checksum of each source: nodes may have caches or corpora of their own."""
    return {
        f"data.sources {source.name}": f"{source.train_tokens:,} training and {source.validation_tokens:,} held-out "
        f"tokens, checksum {source.checksum}"
        for source in sources
    }


@functools.cache
def _source_digest() -> str:
    """Digest of every file of the package: a host may have another checkout, or an edited one."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
