"""What is wrong in the `deepspeed` section: keys that are dsmoe's to set or of no use, and values of the wrong kind.

DeepSpeed would ignore some of them without a word, and end every rank with a traceback for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from dsmoe.config.deepspeed import FREE_KEYS, OWNED_KEYS, REFUSED_KEYS, Kind
from dsmoe.config.errors import Problem
from dsmoe.config.nearest import closest_key
from dsmoe.config.schema import Config
from dsmoe.config.yaml_text import show_value


def deepspeed_problems(config: Config) -> Iterator[Problem]:
    """Yield a problem for each key of the section that cannot be handed to DeepSpeed as it is."""
    yield from _below("", config.deepspeed, FREE_KEYS)


def _below(section: str, given: dict[str, Any], free: dict[str, Any]) -> Iterator[Problem]:
    """Check what is given in a section of DeepSpeed's, dotted and ending with a dot, that has the keys in `free`."""
    for name, value in given.items():
        key = f"{section}{name}"
        if "." not in name and (remedy := _not_to_be_set(key)):
            yield f"deepspeed.{key}", f"deepspeed.{key} {remedy}"
        elif name in free:
            yield from _value(key, value, free[name])
        else:
            guess = closest_key(name, free)
            remedy = f"did you mean '{guess}'?" if guess else f"the keys are {', '.join(free)}"
            yield f"deepspeed.{key}", f"deepspeed.{key}: unknown to DeepSpeed; {remedy}"


def _not_to_be_set(key: str) -> str:
    """Say why a key of DeepSpeed's is none to set, and what to do; or ""."""
    if key in OWNED_KEYS:
        return f"is set by dsmoe; remove it{f' and use {ours}' if (ours := OWNED_KEYS[key]) else ''}"
    reason = next((text for pattern, text in REFUSED_KEYS.items() if fnmatchcase(key, pattern)), "")
    return f"cannot be used with dsmoe: {reason}; remove it" if reason else ""


def _value(key: str, value: Any, free: Kind | dict[str, Any]) -> Iterator[Problem]:
    if isinstance(free, Kind):
        if not free.holds(value):
            got = show_value(value)
            yield f"deepspeed.{key}", f"deepspeed.{key}: expected {free.words}, got {got}; change or remove it"
    elif isinstance(value, dict):
        yield from _below(f"{key}.", value, free)
    else:
        got = show_value(value)
        yield f"deepspeed.{key}", f"deepspeed.{key}: expected a mapping of {', '.join(free)}, got {got}"
