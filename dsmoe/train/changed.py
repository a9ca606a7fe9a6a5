"""Changes at a resume: other text read, other learning rates, other held-out text than the saved run's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from dsmoe.checkpoint.compatibility import Row, rows
from dsmoe.checkpoint.manifest import DamagedError, Facts
from dsmoe.config.dump import flatten
from dsmoe.config.errors import UserError
from dsmoe.config.schedules import learning_rate
from dsmoe.config.schema import Config, Optimizer
from dsmoe.config.sections.base import NonNegativeInt, PositiveInt
from dsmoe.data import PreparedSource
from dsmoe.data.loader import train_sequences
from dsmoe.data.sampling_order import ORDER_VERSION, Mixture
from dsmoe.metrics.definitions import EVAL_LOSS
from dsmoe.plan.plan import Plan
from dsmoe.plan.text import quantity, shown, table
from dsmoe.train.recorded import SavedData, SavedOptimizer, SavedTrain, recorded

_SAME = 1e-12
"""Relative difference of two shares that rounding explains: `weight: 0.3` beside 0.7, and 3 beside 7."""
_SAME_RATE = 1e-6
_RATE_KEYS = ("lr", "min_lr", "schedule", "warmup_steps", "decay_steps")
_EVALUATION_KEYS = (
    *("train.eval_sequences", "train.eval_batches", "train.sequence_length", "data.validation_fraction", "data.seed"),
)
"""Keys that decide, besides the text of the sources, what is evaluated."""
_WHOLE = 1e-9
"""Difference from 1 of the sum of all shares that rounding explains."""

_Count = Annotated[PositiveInt, Field(strict=True)]
_Share = Annotated[float, Field(strict=True, gt=0, le=1)]
_Text = Annotated[str, Field(strict=True, min_length=1)]


@dataclass(frozen=True)
class Order:
    """In which order a run reads which text."""

    version: _Count
    """Version of the rules, `ORDER_VERSION`."""
    seed: Annotated[NonNegativeInt, Field(strict=True)]
    shares: dict[str, _Share]
    """Share of the samples, by source."""
    sequences: dict[str, _Count]
    """Training sequences, by source."""
    texts: dict[str, _Text]
    """Checksum of each source's training and held-out text."""
    tokenizer: Annotated[str, Field(strict=True)] = ""
    """Digest of the tokenizer; empty where it was not recorded."""

    @classmethod
    def of_run(cls, config: Config, sources: Sequence[PreparedSource]) -> Order:
        """The order in which a run reads its sources."""
        total = math.fsum(source.weight for source in sources)
        return cls(
            version=ORDER_VERSION,
            seed=config.data.seed,
            shares={source.name: source.weight / total for source in sources},
            sequences={source.name: len(train_sequences(source, config)) for source in sources},
            texts={source.name: source.checksum for source in sources},
            tokenizer=sources[0].tokenizer,
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Path, facts: Facts) -> Order:
        """The order that a checkpoint was made with; of one from before orders were recorded, what is known of it.

        Raises:
            DamagedError: what was recorded is not what dsmoe records.
        """
        if facts.order:
            order: Order = recorded(checkpoint, "facts.order", _RecordedOrder, facts.order)
            return order
        data: SavedData = recorded(checkpoint, "facts.config.data", SavedData, facts.config.get("data"))
        train: SavedTrain = recorded(checkpoint, "facts.config.train", SavedTrain, facts.config.get("train"))
        corpora: dict[str, tuple[int, int]] = recorded(checkpoint, "facts.corpora", _Corpora, facts.corpora)
        weights = {source.name: source.weight for source in data.sources}
        total = math.fsum(weights.values())
        return cls(
            version=1,
            seed=data.seed,
            shares={name: weight / total for name, weight in weights.items()},
            sequences={name: (tokens - 1) // train.sequence_length for name, (tokens, _) in corpora.items()},
            texts={},
        )

    def counts(self, samples: int) -> dict[str, int]:
        """Count the first `samples` by source."""
        names = list(self.shares)
        if self.version == ORDER_VERSION:
            mixture = Mixture([1] * len(names), [self.shares[name] for name in names], self.seed, names)
            return dict(zip(names, mixture.counts(samples).tolist(), strict=True))
        return {name: round(share * samples) for name, share in self.shares.items()}


def _same_sources(order: Order) -> Order:
    """Check what no field says by itself: the same sources everywhere, and shares of one whole."""
    if not order.shares or not order.shares.keys() == order.sequences.keys() == order.texts.keys():
        raise ValueError("shares, sequences and texts are not of the same sources, one or more")
    if not math.isclose(math.fsum(order.shares.values()), 1, rel_tol=_WHOLE):
        raise ValueError("shares are not those of one whole")
    return order


_RecordedOrder = Annotated[Order, AfterValidator(_same_sources)]
_Corpora = dict[str, tuple[_Count, _Count]]


def saved_tokenizer(facts: Facts) -> str:
    """Digest of the tokenizer that a checkpoint's model was trained with; empty where that was not recorded."""
    digest = facts.order.get("tokenizer", "")
    return digest if isinstance(digest, str) else ""


def changed_order(checkpoint: Path, facts: Facts, plan: Plan, current: Order) -> str | None:
    """Describe how the order of the training text differs from a checkpoint's, with numbers; None where it does not.

    Raises:
        UserError: it differs and `data.changed_order` does not accept that, or the tokenizer is another.
    """
    config, batch = plan.config, plan.batch
    if facts.step == 0:  # nothing has been read
        return None
    saved = Order.of_checkpoint(checkpoint, facts)
    if saved.tokenizer and current.tokenizer and saved.tokenizer != current.tokenizer:
        raise UserError(
            f"{checkpoint} was made with another tokenizer: data.tokenizer is {config.data.tokenizer}, with contents "
            f"of {current.tokenizer[:19]}, and was one of {saved.tokenizer[:19]}. Put that back; to begin anew with "
            f"the weights alone, set checkpoint.weights_from: {checkpoint} and another name"
        )
    differing = _order_rows(saved, current)
    if not differing:
        return None
    done, end = (steps * batch.sequences_per_step for steps in (facts.step, max(batch.steps, facts.step)))
    lines = [
        f"{checkpoint} was made with another order of the training text:",
        *(f"  {line}" for line in table([("", "saved", "here"), *differing], "<<<")),
        f"After step {facts.step}, and in the {quantity(batch.steps - facts.step, 'step')} that are left:",
        *(f"  {line}" for line in _consequences(saved, current, done, end)),
    ]
    if config.data.changed_order == "accept":
        return "\n".join(lines)
    lines.append(
        "To go on so, set data.changed_order: accept. To go on as before, put back what differs; to begin anew with "
        f"the weights alone, set checkpoint.weights_from: {checkpoint} and another name"
    )
    raise UserError("\n".join(lines))


def _order_rows(saved: Order, current: Order) -> list[Row]:
    """Return the key and both values of each difference that decides the order."""
    found = rows({"data.seed": saved.seed}, {"data.seed": current.seed})
    if saved.version != current.version:
        found.append(("dsmoe's rules of the order", f"version {saved.version}", f"version {current.version}"))
    for name in {**saved.shares, **current.shares}:
        key = f"data.sources[{name}]"
        if name not in current.shares or name not in saved.shares:
            was, now = (f"{order.shares[name]:.6%}" if name in order.shares else "absent" for order in (saved, current))
            found.append((key, was, now))
            continue
        old, new = saved.shares[name], current.shares[name]
        if not math.isclose(old, new, rel_tol=_SAME):
            found.append((f"{key}.weight, of all", f"{old:.6%}", f"{new:.6%}"))
        if saved.sequences.get(name) != current.sequences[name]:
            before = f"{saved.sequences[name]:,}" if name in saved.sequences else "unknown"
            found.append((f"{key}, training sequences", before, f"{current.sequences[name]:,}"))
        elif saved.texts and saved.texts[name] != current.texts[name]:
            found.append((f"{key}, checksum of its text and split", saved.texts[name], current.texts[name]))
    return found


def _consequences(saved: Order, current: Order, done: int, end: int) -> list[str]:
    """For each source, what of it is read again and what is left out, when sample `done` is the next of `end`."""
    read, passed, last = saved.counts(done), current.counts(done), current.counts(end)
    lines = []
    for name in {**saved.shares, **current.shares}:
        if name not in current.shares:
            lines.append(f"{name}: {read[name]:,} sequences have been read, and no more will be")
            continue
        length = current.sequences[name]
        if name not in saved.shares:
            lines.append(
                f"{name}: new; of its {length:,} sequences, the order takes {passed[name]:,} for read: they are left "
                f"out until it has been through all of them"
            )
            lines += [
                f"{name} has the text of {old}: under that name it goes on as before"
                for old in saved.shares
                if old not in current.shares and saved.texts.get(old) == current.texts[name]
            ]
            continue
        same = saved.version == current.version and saved.seed == current.seed and saved.sequences.get(name) == length
        if not (same and saved.texts and saved.texts[name] == current.texts[name]):
            share = min(1.0, read[name] / max(1, saved.sequences.get(name, length)))
            lines.append(
                f"{name}: the {last[name] - passed[name]:,} sequences that come are in another order: about "
                f"{share:.1%} of them have been read already"
            )
        elif passed[name] < read[name]:
            again = min(read[name], last[name]) - passed[name]
            lines.append(f"{name}: {again:,} sequences are read a second time before new ones come")
        elif passed[name] > read[name]:
            lines.append(f"{name}: {passed[name] - read[name]:,} sequences are left out")
    if saved.seed != current.seed or saved.version != current.version or _texts_differ(saved, current):
        lines.append(
            f"where another part is held out than before, it has been trained on: {EVAL_LOSS.name} is too low there"
        )
    return lines


def _texts_differ(saved: Order, current: Order) -> bool:
    return any(text != current.texts.get(name, text) for name, text in saved.texts.items())


def changed_rate(checkpoint: Path, facts: Facts, plan: Plan) -> str | None:
    """Describe the jump of the learning rate where a run resumes from a checkpoint, and how to avoid it.

    None where the rate continues as the saved config would have it, or stays as it was.

    Raises:
        DamagedError: what was recorded is not what dsmoe records.
    """
    saved = recorded(checkpoint, "facts.config.optimizer", SavedOptimizer, facts.config.get("optimizer"))
    train: SavedTrain = recorded(checkpoint, "facts.config.train", SavedTrain, facts.config.get("train"))
    if facts.schedule_step > facts.step:
        raise DamagedError(
            f"{checkpoint} is damaged: facts.schedule_step: {facts.schedule_step} is past facts.step, {facts.step}"
        )
    return _jump(saved, train.length, plan.config.optimizer, plan.batch.steps, facts.schedule_step, str(checkpoint))


def changed_held_out(checkpoint: Path, facts: Facts, config: Config, current: Order, held_out: str) -> str | None:
    """Say which keys make a resumed run evaluate other text than the saved one; None if it does not, or if unknown.

    Args:
        checkpoint: for the message.
        facts: of its manifest.
        config: of the run.
        current: what the run reads.
        held_out: names what it evaluates, as `Facts.held_out` does.
    """
    saved, now = flatten(facts.config), flatten(config.model_dump(mode="json"))
    length = "train.sequence_length"
    if not facts.held_out or (facts.held_out == held_out and saved.get(length) == now[length]):
        return None
    keys = [key for key in _EVALUATION_KEYS if key in saved and saved[key] != now.get(key)]
    changes = [f"{key}, {setting_shown(saved[key])} -> {setting_shown(now.get(key))}" for key in keys]
    texts = facts.order.get("texts")
    if isinstance(texts, dict) and texts != current.texts:
        names = [name for name in {**texts, **current.texts} if texts.get(name) != current.texts.get(name)]
        changes.append(f"the text of {', '.join(f'data.sources[{name}]' for name in names)}")
    why = f" ({'; '.join(changes)})" if changes else ""
    return (
        f"what is evaluated is not what it was when {checkpoint} was made"
        f"{why}: held-out losses before and after do not compare. "
        "checkpoint.keep_best keeps the best of each, and the summary compares those from here on"
    )


def setting_shown(value: object) -> str:
    """A value of a config, maybe one from a checkpoint, for a message."""
    return "null" if value is None else shown(str(value))


def rate_when_longer(plan: Plan, steps: int) -> str | None:
    """Describe the jump of the learning rate where a finished run is continued to `steps`; None where there is none."""
    optimizer, done = plan.config.optimizer, plan.batch.steps
    last, planned = (learning_rate(optimizer, done, step) for step in (done - 1, done))
    following = learning_rate(optimizer, steps, done)
    if _is_one_of(following, last, planned):
        return None
    return f"the learning rate jumps from {last:.3g} to {following:.3g}"


def _is_one_of(rate: float, *others: float) -> bool:
    return any(math.isclose(rate, other, rel_tol=_SAME_RATE) for other in others)


def _jump(saved: Optimizer, saved_steps: int, current: Optimizer, steps: int, step: int, checkpoint: str) -> str | None:
    if step == 0 or step >= steps:
        return None
    before, planned = (learning_rate(saved, saved_steps, s) for s in (step - 1, step))
    now = learning_rate(current, steps, step)
    if _is_one_of(now, before, planned):
        return None
    planned_text = "its last" if step >= saved_steps else f"and {planned:.4g} was to follow"
    return (
        f"the learning rate jumps: step {step} of {saved_steps} ({saved.schedule}) had {before:.4g}, {planned_text}; "
        f"step {step + 1} of {steps} ({current.schedule}) takes {now:.4g}. Without a jump: "
        f"{'; or '.join(_without_a_jump(saved, saved_steps, current, steps, before, checkpoint))}"
    ) + (
        ". A run whose length is open is best begun with optimizer.schedule=wsd, and lengthened before its decay"
        if steps != saved_steps
        else ""
    )


def _without_a_jump(
    saved: Optimizer, saved_steps: int, current: Optimizer, steps: int, before: float, checkpoint: str
) -> list[str]:
    """Settings that avoid the jump; `before` is the last rate."""
    left = [f"the length at {saved_steps} steps"] if steps != saved_steps else []
    for key in _RATE_KEYS:
        was, now = getattr(saved, key), getattr(current, key)
        if was != now:
            left.append(f"optimizer.{key} at {'null' if was is None else was}")
    ways = [f"leave {' and '.join(left)}"]
    if before > 0:
        # In as many digits as `_is_one_of` tells apart.
        held = f"optimizer.schedule=constant optimizer.lr={before:.9g} optimizer.min_lr=0 optimizer.warmup_steps=0"
        if current.decay_steps is not None:
            held += " optimizer.decay_steps=null"
        ways.append(f"hold the rate: name=NEW checkpoint.resume={checkpoint} {held}")
    ways.append(f"begin another decay with these weights: name=NEW checkpoint.weights_from={checkpoint}")
    return ways
