"""JSON with a checksum of itself: manifests of checkpoints, `meta.json` of the data cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any


def json_with_checksum(content: Mapping[str, Any], tables: Collection[str] = ()) -> str:
    """Return JSON with a checksum of itself as the last entry, one line per key and per entry of a table.

    The checksum covers the text before it. `{"step": 3, "files": {"a": 1}}` with the table `files`:

        {
        "step": 3,
        "files": {
          "a": 1
        },
        "sha256": "..."
        }

    Args:
        content: the entries, without a key `sha256`.
        tables: the keys whose values are mappings that get one line per entry.
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


def has_valid_checksum(text: str, content: Mapping[str, Any], tables: Collection[str] = ()) -> bool:
    """Return whether `text`, which was parsed to `content`, is exactly what `json_with_checksum` wrote."""
    return json_with_checksum({key: value for key, value in content.items() if key != "sha256"}, tables) == text
