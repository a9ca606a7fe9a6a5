"""JSON files that say themselves whether they are what was written: checkpoints' manifests, caches' descriptions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any


def sealed_json(content: Mapping[str, Any], tables: Collection[str] = ()) -> str:
    """JSON with a checksum of itself as the last entry, a line for each key, and for each entry of a table.

    To check one that was read: `sealed_json` of its content without `sha256` is the very same text.

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
