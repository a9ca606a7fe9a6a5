"""What a checkpoint's manifest says of it besides its tensors, and whether that can be. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dsmoe.checkpoint.headers import are_sizes
from dsmoe.config.yaml_text import MAX_DEPTH

_MOST_LEVELS = MAX_DEPTH + 10
"""The most levels of facts: a config is read as YAML of at most `MAX_DEPTH`, and deeper ones exhaust Python's stack."""


class ContradictionError(ValueError):
    """What is wrong in a manifest whose checksum is right: a program, or a person, wrote it so."""


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint besides its tensors."""

    step: int
    """Optimizer steps done. The order of the data follows from it and the seed."""
    tokens: int
    """Tokens trained on."""
    skipped_steps: int
    """Steps that were not taken because gradients were not finite."""
    schedule_step: int
    """Where the learning-rate schedule is: a skipped step does not advance it."""
    validation_loss: float | None
    """Of an evaluation after this very step."""
    optimizer: str
    config: dict[str, Any]
    """The run's, resolved."""
    layout: dict[str, Any]
    """Of the ranks that wrote it. Any other reads it; random states are those of ranks of this one."""
    versions: dict[str, str]
    corpora: dict[str, list[int]] = field(default_factory=dict)
    """By source, how many tokens and bytes of training text it had."""
    order: dict[str, Any] = field(default_factory=dict)
    """The order of the training text, as `dsmoe.train.changed` compares it; empty where it was not recorded."""
    held_out: str = ""
    """Names the text that the evaluation read: losses of others are not to be compared."""


def facts_of(entry: dict[str, Any]) -> Facts:
    """The facts, each of its type; a field that this version does not know, or lacks, raises TypeError.

    Raises:
        ContradictionError: no checkpoint of dsmoe's has such facts.
    """
    if _is_deeper(entry, _MOST_LEVELS):
        raise ContradictionError(f"its facts are more than {_MOST_LEVELS} levels deep")
    facts = Facts(**entry)
    counts = {name: getattr(facts, name) for name in ("step", "tokens", "skipped_steps", "schedule_step")}
    wrong = [name for name, value in counts.items() if not are_sizes([value])]
    kinds = {"optimizer": str, "config": dict, "layout": dict, "versions": dict, "corpora": dict}
    kinds |= {"order": dict, "held_out": str}
    wrong += [name for name, kind in kinds.items() if type(getattr(facts, name)) is not kind]
    loss = facts.validation_loss
    if loss is not None and not (type(loss) in (int, float) and math.isfinite(loss) and loss >= 0):
        wrong.append("validation_loss")
    if not wrong and not all(are_sizes(sizes) for sizes in facts.corpora.values()):
        wrong.append("corpora")
    sections = ("model", "train") if "config" not in wrong else ()
    wrong += [f"config.{name}" for name in sections if type(facts.config.get(name)) is not dict]
    if "config" not in wrong and type(facts.config.get("name")) is not str:
        wrong.append("config.name")
    if wrong:
        raise ContradictionError(f"its facts have no such value: {', '.join(wrong)}")
    if contradictions := list(_contradictions(facts)):
        raise ContradictionError(f"its facts contradict each other: {'; '.join(contradictions)}")
    return facts


def _contradictions(facts: Facts) -> Iterator[str]:
    """Counts that no run has together: each step is taken, which advances the schedule, or skipped."""
    step, skipped, taken = facts.step, facts.skipped_steps, facts.schedule_step
    if skipped + taken != step:
        yield f"schedule_step is {taken} and skipped_steps {skipped}, which make {skipped + taken}, and step is {step}"
    batch = facts.config["train"].get("batch_tokens")
    if type(batch) is int and facts.tokens != step * batch:
        yield f"tokens is {facts.tokens}, and {step} steps of config.train.batch_tokens ({batch}) are {step * batch}"


def _is_deeper(value: object, most: int) -> bool:
    """Whether there are more than `most` levels of mappings and lists."""
    level = [value]
    for _ in range(most + 1):
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True
