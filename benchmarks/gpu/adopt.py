"""Take over a run: its files into `benchmarks/results`, block sizes into the kernels' table, the README's status.

The table at the top of the README says what has run where: `status` makes it from the results, and a test compares.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.gpu import tune
from benchmarks.gpu.results import Outcome
from benchmarks.measuring import Row
from dsmoe.kernels import blocks

BEGIN, END = "<!-- status: `python -m benchmarks.gpu --adopt FILE` writes this -->", "<!-- end of status -->"
RESULTS = Path("benchmarks") / "results"


def adopt(file: Path, root: Path) -> list[str]:
    """Take over the results in `file` for the repository in `root`; says what was changed.

    Raises:
        ValueError: the file is not the JSON of a run of `benchmarks.gpu`.
        OSError: it, or the Markdown file beside it, cannot be read.
    """
    results = read_results(file)
    page, readme = file.with_suffix(".md"), root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not page.is_file():
        raise ValueError(f"{page} is not there; adopt a run's JSON file where its page lies beside it")
    if text.find(BEGIN) < 0 or text.find(END) < text.find(BEGIN):
        raise ValueError(f"{readme} has no place for the status; put the lines {BEGIN!r} and {END!r} into it")
    changed = []
    best = [row for stage in results["stages"] for row in stage["rows"] if row.get("kind") == "best"]
    if not results["rehearsal"] and best:
        table = root / blocks.TABLE.relative_to(blocks.TABLE.parents[2])
        changed += [f"took {kernel} into {table.relative_to(root)}" for kernel in tune.adopt(best, table)]
    for source in (file, page):
        target = root / RESULTS / source.name
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
            changed.append(f"copied {target.relative_to(root)}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{status(root / RESULTS)}\n{END}{after}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
        changed.append("wrote the status in README.md")
    return changed or ["nothing to change"]


def read_results(file: Path) -> Row:
    """The JSON of a run.

    Raises:
        ValueError: it is something else.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for stage in tree["stages"] for row in Outcome(**stage).rows]
        texts = [
            tree["date"],
            tree["hardware"],
            tree["packages"]["torch"],
            *(stage["word"] for stage in tree["stages"]),
        ]
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("a value of another kind")
        if tree["page"] != f"{file.stem}.md":
            raise ValueError(f"it was named {Path(tree['page']).stem}.json")
        return {key: tree[key] for key in ("rehearsal", "devices")} | tree
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the JSON file of a run of `python -m benchmarks.gpu` ({error!r})") from error


def status(folder: Path) -> str:
    """A Markdown table of what has run where: the newest run of each device, or of a rehearsal while there is none."""
    runs = sorted((read_results(file) for file in folder.glob("gpu_*.json")), key=lambda run: str(run["date"]))
    newest = {(run["rehearsal"], run["hardware"]): run for run in runs}
    real = [run for (is_rehearsal, _), run in newest.items() if not is_rehearsal]
    rehearsed = [run for run in runs if run["rehearsal"]][-1:]
    lines = [
        "| what has run | where | when |",
        "|---|---|---|",
        "| all tests; hosts in network namespaces | CPU, gloo | every commit (CI) |",
    ]
    lines += [_line("`make gpu`", run) for run in reversed(real)]
    if not real:
        lines.append("| nothing yet | CUDA, NCCL | |")
        lines += [_line("`make gpu`, rehearsed", run) for run in rehearsed]
    return "\n".join(lines)


def _line(what: str, run: Row) -> str:
    outcomes = [Outcome(**stage) for stage in run["stages"]]
    done = ", ".join(outcome.stage for outcome in outcomes if outcome.is_done)
    others = [f"{o.stage} {o.word} ({o.why})".replace("|", "\\|") for o in outcomes if not o.is_done]
    results = "; ".join([*others, *([f"{done} done"] if done else [])])
    where = f"{run['devices']} x {run['hardware']}, torch {run['packages']['torch']}"
    return f"| {what}: [{results}]({RESULTS.as_posix()}/{run['page']}) | {where} | {run['date'][:10]} |"
