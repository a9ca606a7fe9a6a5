"""Stage 1: is it right on this device? Tests against CPU twins, and training through `launch/pretrain.py`.

    python -m benchmarks.gpu.right --device cuda|cpu --ranks N [--tiny] [--rows FILE] [--seconds S]

Checks run beside each other, as many as there are cores for: most of their time is spent on starting and compiling.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.gpu import training
from benchmarks.gpu.training import Bench
from benchmarks.measuring import Deadline, Row, Rows, add_stage_options
from dsmoe.exit_codes import DONE

CORES_PER_RANK = 2
TEST_SECONDS = {"cuda": 60.0, "cpu": 240.0}
"""After which a single test hangs."""
TESTS = {
    "kernels: activation": ["tests/kernels/test_weighted_activation.py"],
    "kernels: router": ["tests/kernels/test_topk_router.py"],
    "kernels: sort": ["tests/kernels/test_permute.py"],
    "kernels: sums": ["tests/kernels/test_bag_sum.py"],
    "layer: kernels and CPU give the same": ["tests/kernels/test_kernel_layer.py"],
    "layer: both ways of the experts": ["tests/moe/test_grouped_ffn.py"],
    "layer: no host reads, CUDA graph, torch.compile": ["tests/moe/test_static.py"],
}
TINY_TESTS = {
    "kernels: sums": ["tests/kernels/test_bag_sum.py"],
    "layer: CUDA graph": ["tests/moe/test_static.py", "-k", "captured and factor"],
}


def main() -> int:
    """Run all checks; the exit code is 0 whatever they found, which is in the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--ranks", type=int, default=1, help="the most that train together")
    parser.add_argument("--tiny", action="store_true", help="a few checks of each kind")
    add_stage_options(parser)
    options = parser.parse_args()
    rows, deadline = Rows(options.rows), Deadline(options.seconds)
    lock = threading.Lock()

    def do(check: Check) -> None:
        for row in check.run(deadline):
            with lock:
                rows.add(row)
                print(row, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.device, options.ranks, deadline, options.tiny)
        bench.write_config()
        with ThreadPoolExecutor(checks_at_once(len(os.sched_getaffinity(0)), options.ranks)) as pool:
            list(pool.map(do, all_checks(bench)))
    return DONE


def checks_at_once(cores: int, ranks: int) -> int:
    """Number of checks at once, each with cores of its own; two at most of several ranks, which share the devices."""
    return max(1, min(cores // (CORES_PER_RANK * ranks), 8 if ranks == 1 else 2))


@dataclass(frozen=True)
class Check:
    """A named check and the function that runs it."""

    name: str
    action: Callable[[], Iterable[Row]]

    def run(self, deadline: Deadline) -> Iterator[Row]:
        """Its rows, each as soon as it is known; `passed` is None where there is no time to begin."""
        row: Row = {"kind": "checks", "check": self.name, "passed": None}
        if deadline.passed():
            yield row
            return
        try:
            yield from self.action()
        except Exception as error:
            traceback.print_exc()
            yield {**row, "passed": False, "detail": repr(error)}


def all_checks(bench: Bench) -> list[Check]:
    """The checks; the longest come first, so that little is left over at the end."""
    ranks, tiny = bench.ranks, bench.tiny
    precisions, tests = (("bf16",), TINY_TESTS) if tiny else (("bf16", "fp32"), TESTS)
    kills = [("bf16", 1, 1)] if tiny else [("bf16", 1, ranks), ("fp32", 2, ranks), ("bf16", 0, ranks)]
    layouts = [("fp32", True)] if tiny else list(product(("fp32", "bf16"), (True, False)))
    checks = [Check(f"training in {name}", partial(training_in, bench, name)) for name in precisions]
    for precision, zero, world in kills:
        name = f"through a kill in {precision}, ZeRO {zero}"
        checks.append(Check(name, partial(training.through_a_kill, bench, precision, zero, world)))
    checks += [Check(name, partial(tested, name, files, bench)) for name, files in tests.items()]
    for precision, padded in layouts if ranks > 1 else []:
        name = f"layouts in {precision}, {'padded' if padded else 'dropless'}"
        checks.append(Check(name, partial(training.same_on_layouts, bench, precision, padded)))
    return checks


def training_in(bench: Bench, precision: str) -> Iterator[Row]:
    """A CPU's run, and the devices' runs beside it: every ZeRO stage and launcher, and one rank without a launcher."""
    reference, failed = training.begin_on_cpu(bench, precision)
    if failed:
        yield failed
        return
    ranks = bench.ranks
    settings = [(1, ranks, "torchrun")]
    if not bench.tiny:
        settings += [(0, ranks, "torchrun"), (2, ranks, "torchrun"), (1, ranks, "deepspeed")]
        settings += [(1, 1, "python")]
    with ThreadPoolExecutor(2 if bench.device == "cuda" else 1) as pool:
        runs = [pool.submit(training.as_on_a_cpu, bench, reference, precision, *setting) for setting in settings]
        yield from (run.result() for run in runs)


def tested(name: str, files: Sequence[str], bench: Bench) -> list[Row]:
    """Run pytest on some files; the row has what it counted, and the first failure."""
    report = bench.folder / f"{re.sub(r'[^a-z]+', '_', name)}.xml"
    output = report.with_suffix(".out")
    row: Row = {"kind": "tests", "check": name, "passed": False}
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", "--junitxml", str(report)]
    options = ["-o", "addopts=-v --strict-markers", "-o", f"timeout={TEST_SECONDS[bench.device]:.0f}"]
    begun = time.monotonic()
    process = training.start([*command, *options], training.environment(bench.device), output)
    why = training.wait_within(bench.deadline, process, output)
    row["seconds"] = time.monotonic() - begun
    if not report.exists():
        return [training.not_passed(row, why or "it wrote no report")]
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    row |= {"tests": len(cases), "failures": len(failures), "skipped": skipped}
    if failures:
        return [{**row, "detail": f"{failures[0].get('name')}: {_message(failures[0])}"}]
    if len(cases) == skipped:
        return [{**row, "detail": "no test was run"}]
    # The report is written when all tests have run: that the time was up just then does not count.
    return [{**row, "passed": True} if why in (None, training.NO_TIME) else training.not_passed(row, why)]


def _message(case: ElementTree.Element) -> str:
    problem = next(part for part in case if part.tag in ("failure", "error"))
    return (problem.get("message") or "").strip().splitlines()[0][:200] if problem.get("message") else problem.tag


if __name__ == "__main__":
    sys.exit(main())
