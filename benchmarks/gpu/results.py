"""Results of the stages: read from their files, written as one JSON and one Markdown file after every stage."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.supervise import End
from benchmarks.measuring import Row
from dsmoe.plan.text import quantity, table
from dsmoe.runtime.atomic_files import write_whole

LEFT_OUT_KINDS, LEFT_OUT_KEYS = ("tune",), ("kind", "settings")
"""What the Markdown file has no room for; the JSON has everything."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage.

    Attributes:
        word: `done`, `failed`, `out of time`, `killed`, `interrupted` or `not begun`.
        why: None where it is done.
        rows: its figures and checks, also of a stage that did not end well.
    """

    stage: str
    word: str
    why: str | None
    seconds: float
    limit_seconds: float
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def judge(cls, stage: str, end: End, rows: list[Row], unreadable: int, limit_seconds: float) -> Outcome:
        """Judge a stage by how its program ended and by what it wrote.

        A check is a row with `passed`: True, False, or None where there was no time for it.
        """
        word, reasons = end.word, [end.why] if end.why else []
        verdicts = [row["passed"] for row in rows if "passed" in row]
        if failed := [row for row in rows if row.get("passed", True) is False]:
            reasons.insert(0, f"{len(failed)} of {len(verdicts)} checks failed, the first: {_name(failed[0])}")
            word = "failed" if word == "done" else word
        if not_done := verdicts.count(None):
            reasons.append(f"no time for {not_done} of {len(verdicts)} checks")
            word = "out of time" if word == "done" else word
        if unreadable:
            reasons.append(f"{unreadable} of its lines are no figures")
            word = "failed" if word == "done" else word
        if not rows and word == "done":
            word, reasons = "failed", ["it ended without a figure"]
        return cls(stage, word, "; ".join(reasons) or None, end.seconds, limit_seconds, rows)

    @property
    def is_done(self) -> bool:
        """Return whether the stage did all that it is for."""
        return self.word == "done"

    @property
    def summary(self) -> str:
        """Sum up the stage: `9 of 9 checks passed, 12 figures, 1 left out`."""
        verdicts = [row["passed"] for row in self.rows if "passed" in row]
        left_out = sum("error" in row for row in self.rows)
        figures = len(self.rows) - len(verdicts) - left_out
        tests = sum(row.get("tests", 0) for row in self.rows)
        parts = [f"{verdicts.count(True)} of {quantity(len(verdicts), 'check')} passed"] if verdicts else []
        parts += [f"{quantity(tests, 'test')} in them"] if tests else []
        parts += [quantity(figures, "figure")] if figures else []
        parts += [f"{left_out} left out"] if left_out else []
        return ", ".join(parts) or "nothing"

    def sentence(self) -> str:
        """For the console, when the stage has ended."""
        return f"{self.word} in {self.seconds:.0f} s: {self.summary}" + (f" ({self.why})" if self.why else "")


class Results:
    """All outcomes of a run; the files are written anew after each, so that an end at any moment loses one stage.

    Args:
        folder: where they are written, and a folder of the run's name for the stages' logs.
        facts: what `benchmarks.gpu.machine` says.
        is_rehearsal: the sizes are tiny, and the figures mean nothing.
    """

    def __init__(self, folder: Path, facts: Row, is_rehearsal: bool) -> None:
        when = _slug(facts["date"].removesuffix(" UTC"))  # to the minute: a second run on a day overwrites nothing
        name = f"gpu_{'rehearsal' if is_rehearsal else _slug(facts['hardware'])}_{when}"
        self.logs = folder / name
        self.json_path, self.markdown_path = folder / f"{name}.json", folder / f"{name}.md"
        self.facts = {**facts, "rehearsal": is_rehearsal, "page": self.markdown_path.name}
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """Take in how a stage went."""
        self.outcomes.append(outcome)
        tree = {**self.facts, "stages": [asdict(outcome) for outcome in self.outcomes]}
        try:
            write_whole(self.json_path, json.dumps(tree, indent=1) + "\n")
            write_whole(self.markdown_path, markdown(tree))
        except OSError as error:  # the next stage may still be worth its time: its log and the console have figures
            print(f"error: cannot write {self.json_path}: {error.strerror}", file=sys.stderr, flush=True)

    def table(self) -> str:
        """The last lines of the console."""
        cells = [
            [o.stage, o.word, f"{o.seconds:.0f}", f"{o.limit_seconds:.0f}", o.summary, o.why or ""]
            for o in self.outcomes
        ]
        cells.insert(0, ["stage", "result", "seconds", "of", "what there is", "why"])
        return "\n".join(line.rstrip() for line in table(cells, "<<>><<"))


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of a stage's file, and how many lines are none: a killed program can leave half of one."""
    if not path.exists():
        return [], 0
    rows, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unreadable += 1
    return rows, unreadable


def markdown(tree: Row) -> str:
    """The results as a page: the machine, the stages, and a table for every kind of row."""
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in tree["packages"].items())
    driver = f", driver {tree['driver']}, CUDA {tree['cuda']}" if "driver" in tree else ""
    commit = f", commit {tree['commit'][:12]}" if tree.get("commit") else ""
    tiny = ["Tiny sizes on a CPU: the figures below show that the stages work, and nothing else.", ""]
    lines = [
        f"# {'Rehearsal without a GPU' if tree['rehearsal'] else tree['hardware']}, {tree['date']}",
        "",
        f"{tree['devices']} x {tree['hardware']}{driver}; Python {tree['python']}, {packages}{commit}.",
        "",
        f"```bash\n{tree['command']}\n```",
        "",
        *(tiny if tree["rehearsal"] else []),
        *_table([["stage", "result", "seconds", "what there is", "why"], *map(_stage_cells, tree["stages"])]),
    ]
    for stage in tree["stages"]:
        kinds: dict[str, list[Row]] = {}
        for row in stage["rows"]:
            kinds.setdefault(str(row.get("kind", stage["stage"])), []).append(row)
        for kind, rows in kinds.items():
            if kind not in LEFT_OUT_KINDS:
                lines += ["", f"## {stage['stage']}: {kind.replace('_', ' ')}", "", *_rows(rows)]
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[Row]) -> list[str]:
    """A table of rows of one kind; what is the same in all of them stands above it."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in LEFT_OUT_KEYS]
    same = [key for key in keys if len(rows) > 1 and all(row.get(key) == rows[0].get(key) for row in rows)]
    columns = [key for key in keys if key not in same]
    cells = [[key.replace("_", " ") for key in columns], *([_cell(row.get(key)) for key in columns] for row in rows)]
    alike = ", ".join(f"{key.replace('_', ' ')} {_cell(rows[0][key])}" for key in same)
    return [*([f"{alike}:", ""] if alike else []), *_table(cells)]


def _stage_cells(stage: Row) -> list[str]:
    outcome = Outcome(**stage)
    return [outcome.stage, outcome.word, f"{outcome.seconds:.0f}", outcome.summary, outcome.why or ""]


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case dict():
            return ", ".join(f"{key} {_cell(part)}" for key, part in value.items())
        case list():
            return ", ".join(_cell(part) for part in value)
    return str(value)


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def _name(row: Row) -> str:
    """A check as a sentence names it."""
    name = str(row.get("check", row.get("kind", "a check")))
    return f"{name} ({row['detail']})" if row.get("detail") else name


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
