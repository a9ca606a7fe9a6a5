"""The verdict as text for a person, as one JSON object for a program, and as the `cluster` section that fits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.config.yaml_text import write_yaml
from dsmoe.plan import Plan
from dsmoe.plan.text import quantity, table
from dsmoe.preflight.judge import Check, Verdict
from dsmoe.preflight.judge.wording import amount, share
from dsmoe.preflight.results import RankReport
from dsmoe.runtime.atomic_files import write_whole

MEMORY_DIFFERS = 0.03


def text(plan: Plan, verdict: Verdict, reports: Sequence[RankReport], seconds: float) -> str:
    """The verdict for a person: the ranks, the table, the findings, and the section to paste."""
    config, cluster, versions = plan.config, plan.config.cluster, reports[0].versions
    ranks = f"{quantity(cluster.nodes, 'node')} x {quantity(cluster.devices_per_node, 'device')}"
    lines = [
        f"preflight of {config.name}: {ranks} in {seconds:.0f} s",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if verdict.checks:
        lines += ["", *_table(verdict.checks)]
    lines += ["", *_findings(verdict)]
    if section := corrected_cluster(plan, verdict.measured):
        lines += ["", "what this cluster is, to be pasted into the YAML:", "", section.rstrip()]
    return "\n".join(lines)


def corrected_cluster(plan: Plan, measured: Mapping[str, float]) -> str:
    """The `cluster` section with what was measured, each figure with what it replaces; empty if nothing was."""
    if not measured:
        return ""
    cluster, device = plan.config.cluster, plan.device
    section: dict[str, Any] = {"nodes": cluster.nodes, "devices_per_node": cluster.devices_per_node}
    section |= cluster.model_dump(exclude_defaults=True)
    comments: dict[str, str] = {}
    promised_gib, memory_gib = device.memory_gib if device else None, measured.get("memory_gib", 0.0)
    if device and promised_gib and abs(memory_gib / promised_gib - 1) > MEMORY_DIFFERS:
        section["device"] = {"memory_gib": _rounded(memory_gib), "peak_tflops": device.peak_tflops}
        comments["device"] = f"memory as measured, in place of {amount(promised_gib)} GiB"
    for key in (key for key in measured if key != "memory_gib"):
        value = measured[key]
        promised = getattr(cluster, key)
        section[key] = _rounded(value)
        comments[key] = f"measured; was {amount(promised)}" if promised else "measured"
    lines = ["cluster:"]
    for key, value in section.items():
        comment = f"  # {comments[key]}" if key in comments else ""
        first, *rest = write_yaml({key: value}).rstrip().splitlines()
        lines += [f"  {first}{comment}", *(f"  {line}" for line in rest)]
    return "\n".join(lines) + "\n"


def write_json(path: Path, plan: Plan, verdict: Verdict, reports: Sequence[RankReport], seconds: float) -> None:
    """Write everything, each rank's numbers included; what is no number becomes null."""
    tree = {
        "name": plan.config.name,
        "exit_code": verdict.exit_code,
        "seconds": seconds,
        "findings": [{"serious": finding.serious, "text": finding.text} for finding in verdict.findings],
        "checks": [vars(check) for check in verdict.checks],
        "cluster": verdict.measured,
        "ranks": [report.json() for report in reports],
    }
    write_whole(path, json.dumps(_without_nan(tree), indent=2) + "\n")


def _table(checks: Sequence[Check]) -> list[str]:
    rows = [["check", "with", "median", "worst", "of median", "where", "promised", "reached"]]
    for check in checks:
        worst = [amount(check.worst), share(check.worst, check.median), check.where] if check.where else [""] * 3
        promise = [amount(check.promised), share(check.median, check.promised)] if check.promised else ["", ""]
        rows.append([check.name, check.size, f"{amount(check.median)} {check.unit}", *worst, *promise])
    return table(rows, "<<>>><>>")


def _findings(verdict: Verdict) -> list[str]:
    if not verdict.findings:
        return ["all fine"]
    lines = [f"{'PROBLEM' if finding.serious else 'note':<7}  {finding.text}" for finding in verdict.findings]
    return lines if verdict.exit_code else [*lines, "fine otherwise"]


def _rounded(value: float) -> float:
    """Three figures, which is more than a measurement is worth."""
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded.is_integer() else rounded


def _without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
