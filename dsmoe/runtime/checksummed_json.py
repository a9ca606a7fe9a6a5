"""JSON files that say themselves whether they are what was written: checkpoints' manifests, caches' descriptions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any


def sealed_json(content: Mapping[str, Any], tables: Collection[str] = ()) -> str:
    """JSON with a checksum of itself as the last entry, a line for each key, and for each entry of a table.

    Args:
        content: what is written, without a key `sha256`.
        tables: the keys whose values are mappings that get a line for each entry.
    """
    lines: list[str] = []
    for key, value in content.items():
        if key in tables:
            entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{entries}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    text = ",\n".join(lines)
    return f'{{\n{text},\n"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def is_sealed(text: str, content: Mapping[str, Any], tables: Collection[str] = ()) -> bool:
    """Check that `text`, as which `content` was read, is what `sealed_json` wrote."""
    return sealed_json({key: value for key, value in content.items() if key != "sha256"}, tables) == text
