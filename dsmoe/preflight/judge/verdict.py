"""The verdict: a table, findings, and what the config should say."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsmoe.exit_codes import DONE, FAILED


@dataclass(frozen=True)
class Finding:
    """Something to know, in one sentence; a serious one should keep the job from starting."""

    text: str
    serious: bool = True


@dataclass(frozen=True)
class Check:
    """A line of the table: what was measured, what is usual, who is worst, and what was promised."""

    name: str
    unit: str
    median: float
    worst: float
    where: str
    """The worst rank; empty where there is no other."""
    promised: float | None = None
    size: str = ""
    """Size of the measured product or message, in words."""


@dataclass
class Verdict:
    """All that there is to say."""

    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    """Values that the `cluster` section should have, by key."""
    blamed: set[int] = field(default_factory=set)
    """Ranks that have been named for their links: what they take part in needs no other cause."""

    @property
    def exit_code(self) -> int:
        """0, or 1 where something is far off."""
        return FAILED if any(finding.serious for finding in self.findings) else DONE

    def say(self, text: str, serious: bool = True) -> None:
        """Add a finding."""
        self.findings.append(Finding(text, serious))
