"""Draw a run's loss and expert load as an SVG, from the `metrics.jsonl` and `train.log` of its folder.

The picture of the README, after `make train`:

    python -m benchmarks.draw_run runs/tiny_cpu docs/images/tiny_cpu.svg
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Point = tuple[float, float]
WIDTH, HEIGHT = 880, 330
INK, GREY, RULE, BLUE, RED = "#24292f", "#6e7781", "#d8dee4", "#0969da", "#bc4c00"
FONT = "font-family='Helvetica, Arial, sans-serif'"
OUTLINE = "stroke='#ffffff' stroke-width='4' paint-order='stroke'"


class Panel(NamedTuple):
    """A pair of axes: its place in the picture in pixels, and the ranges of x and y that it shows."""

    left: float
    right: float
    steps: float
    low: float
    high: float
    top: float = 62
    bottom: float = 280

    def place(self, point: Point) -> Point:
        x, y = point
        return (
            self.left + x / self.steps * (self.right - self.left),
            self.bottom - (y - self.low) / (self.high - self.low) * (self.bottom - self.top),
        )


def text(x: float, y: float, words: str, colour: str = INK, size: int = 12, anchor: str = "start") -> str:
    """Return the words with a white outline, which keeps them readable over a line."""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' fill='{colour}' font-size='{size}' text-anchor='{anchor}' {FONT} {OUTLINE}>"
        f"{words}</text>"
    )


def line(panel: Panel, points: Sequence[Point], colour: str, width: float = 2, dashes: str = "none") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(panel.place, points))
    return (
        f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}' "
        f"stroke-dasharray='{dashes}' stroke-linejoin='round'/>"
    )


def dots(panel: Panel, points: Sequence[Point], colour: str) -> str:
    places = map(panel.place, points)
    return "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'/>" for x, y in places)


def axes(panel: Panel, title: str, ticks: Sequence[float]) -> str:
    parts = [text(panel.left - 26, 34, title, size=14)]
    for tick in ticks:
        x, y = panel.place((0, tick))
        parts += [
            line(panel, [(0, tick), (panel.steps, tick)], RULE, 1),
            text(x - 8, y + 4, f"{tick:g}", GREY, 11, "end"),
        ]
    for quarter in range(5):
        step = panel.steps * quarter / 4
        x, _ = panel.place((step, panel.low))
        parts.append(text(x, panel.bottom + 18, f"{step:g}", GREY, 11, "middle"))
    parts.append(text((panel.left + panel.right) / 2, panel.bottom + 38, "step", GREY, 12, "middle"))
    return "".join(parts)


def draw(rows: list[dict[str, float]], bigram: float) -> str:
    """Return the SVG of a run whose tokens are bytes: loss / ln 2 is then bits per byte."""

    def series(key: str, scale: float = 1.0) -> list[Point]:
        return [(row["step"], row[key] * scale) for row in rows if key in row]

    steps = rows[-1]["step"]
    held_out, trained = series("eval/bits_per_byte"), series("train/loss", 1 / math.log(2))
    loss = Panel(50, 420, steps, 2, 9)
    x, y = loss.place(held_out[-1])
    parts = [
        axes(loss, "Bits per byte (lower is better)", range(2, 10)),
        line(loss, [(0, bigram), (steps, bigram)], RED, 1.5, "6 4"),
        text(loss.right, loss.place((0, bigram))[1] - 7, f"bigram model {bigram:.3f}", RED, anchor="end"),
        line(loss, trained, GREY, 1.5),
        line(loss, held_out, BLUE),
        dots(loss, held_out, BLUE),
        text(loss.right, loss.top + 22, "held-out text", BLUE, anchor="end"),
        text(loss.right, loss.top + 40, "training", GREY, anchor="end"),
        text(x + 8, y + 4, f"{held_out[-1][1]:.3f}", BLUE),
    ]
    worst, mean = series("moe/load_max_over_mean"), series("moe/load_max_over_mean/mean")
    load = Panel(500, 850, steps, 0.5, 4)
    parts += [
        axes(load, "Load of the busiest expert / mean load", (1, 2, 3, 4)),
        line(load, [(0, 1), (steps, 1)], RED, 1.5, "6 4"),
        text(load.right, load.place((0, 1))[1] + 16, "1: every expert the same", RED, anchor="end"),
        line(load, worst, BLUE),
        line(load, mean, GREY, 1.5),
        text(load.right, load.top + 22, "worst layer", BLUE, anchor="end"),
        text(load.right, load.top + 40, "mean of the layers", GREY, anchor="end"),
    ]
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' "
            f"width='{WIDTH}' height='{HEIGHT}'>",
            "<!-- python -m benchmarks.draw_run runs/tiny_cpu docs/images/tiny_cpu.svg -->",
            f"<rect x='1' y='1' width='{WIDTH - 2}' height='{HEIGHT - 2}' rx='8' fill='#ffffff' stroke='{RULE}'/>",
            *parts,
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run with data.tokenizer: bytes")
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    rows = [json.loads(row) for row in (arguments.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    log = (arguments.run / "train.log").read_text(encoding="utf-8")
    (bigram,) = re.findall(r"a bigram model of the same tokens reaches ([\d.]+) bits/byte", log)
    arguments.svg.write_text(draw(rows, float(bigram)), encoding="utf-8")


if __name__ == "__main__":
    main()
