"""The page docs/metrics.md, rendered from the definitions: `python -m dsmoe.metrics.document > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from dsmoe.metrics.definitions import GROUPS, METRICS
from dsmoe.metrics.metric import Combine, Metric, Reduction, When

_INTRODUCTION = """\
# Metrics

<!-- Rendered from dsmoe/metrics/definitions.py: python -m dsmoe.metrics.document > docs/metrics.md -->

A run writes its metrics to `metrics.jsonl` in its folder, one JSON object per line, and under the same names to
`tensorboard/`. Every object has `step` (optimizer steps done) and `time` (seconds since 1970). Training lines come
every `observe.log_every` steps and after the last step; evaluation lines before the first step, every
`train.eval_every` steps and after the last one. A run that is resumed removes the lines of steps after its checkpoint
and does those steps again.

A figure that is not finite is written as `NaN` or `Infinity`, which Python reads.

## Reductions

A metric covers all micro-batches, ranks and MoE layers of the logged step; throughput and stalls cover the steps since
the training line before. The tables say how one number is made of several; an axis that is not named has one number.
"""

_EXPLAINED = {
    Combine.SUM: "the sum; where the metric is no sum itself, that of the counts or scores from which it is computed",
    Combine.RATIO: "the sum of the numerators / the sum of the denominators",
    Combine.MEAN: "the mean",
    Combine.MAX: "the largest: the slowest rank's seconds, the worst layer",
    Combine.MIN: "the smallest: the slowest rank's rate",
}

_LAYERS = """\
Metrics marked * are also written for each MoE layer, every `observe.layer_detail_every` steps:
`{in_layer}` is `{name}` in block 3.
Those of the worst layer (layers: max) come with the mean over the layers, `{mean}`.
"""


def page() -> str:
    """Return docs/metrics.md."""
    return "\n".join([_INTRODUCTION, *_reductions(), *(line for group in GROUPS for line in _section(group))])


def _reductions() -> list[str]:
    used = {_combined(metric.reduction, field.name) for metric in METRICS for field in fields(Reduction)}
    rows = ((f"`{combine.value}`", text) for combine, text in _EXPLAINED.items() if combine in used)
    return [*_table(("reduction", "the one number"), rows), ""]


def _section(group: str) -> list[str]:
    """Return the title and the table of a group; the first metric says which lines have the group."""
    metrics = [metric for metric in METRICS if metric.group == group]
    when = metrics[0].when
    lines = [f"## {GROUPS[group]}: `{group}/`", "", f"In {when.value}.", ""]
    example = next((metric for metric in metrics if metric.layer_mean), None)
    if example:
        lines.append(_LAYERS.format(name=example.name, in_layer=example.in_layer(3), mean=example.layer_mean))
    rows = ((_name(metric), metric.unit, _meaning(metric, when), _reduced(metric.reduction)) for metric in metrics)
    return [*lines, *_table(("name", "unit", "meaning", "reduction"), rows), ""]


def _name(metric: Metric) -> str:
    return f"`{metric.name}`" + (" *" if metric.in_every_layer else "")


def _meaning(metric: Metric, usual: When) -> str:
    """Return the sentence, the source, and the lines that have the metric where these are not the usual ones."""
    source = f"Source: {metric.source}" if metric.source else ""
    exception = f"Only in {metric.when.value}" if metric.when is not usual else ""
    return " ".join(f"{part}." for part in (metric.meaning, source, exception) if part)


def _reduced(reduction: Reduction) -> str:
    """`micro-batches, ranks: sum; layers: max`."""
    axes: dict[str, list[str]] = {}
    for field in fields(reduction):
        combine = _combined(reduction, field.name)
        if combine is not None:
            axes.setdefault(combine.value, []).append(field.name.replace("_", "-"))
    return "; ".join(f"{', '.join(names)}: {how}" for how, names in axes.items())


def _combined(reduction: Reduction, axis: str) -> Combine | None:
    combine: Combine | None = getattr(reduction, axis)
    return combine


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in cells]


if __name__ == "__main__":
    print(page(), end="")
