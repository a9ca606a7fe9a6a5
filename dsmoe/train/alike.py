"""What every rank of a run must have alike: its settings, its code and its data, as claims."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dsmoe.config.schema import Config

PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "datasets", "pyarrow")
"""Of which another version may compute, read or exchange something else."""


def claims_of_run(config: Config) -> dict[str, str]:
    """The resolved config key by key, and what runs it."""
    packages = {name: _version(name) for name in PACKAGES}
    source = {"dsmoe's source": _source_digest()}
    return {**dict(_flat(config.model_dump(mode="json"))), "python": platform.python_version(), **packages, **source}


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`optimizer.lr` and `0.0003`; a list is one value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, sort_keys=True)


def _source_digest() -> str:
    """Of every file of the package: hosts with a checkout of their own may have another one, or edited it."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
