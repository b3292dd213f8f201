"""What an audit says: a row for each invariant, and each violation with the lines of the journal that show it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

KEPT = 200
"""Violations kept of each invariant; all are counted."""

INVARIANTS = {
    "I1 prompts": "every issued prompt is trained on once, dropped with a reason, or outstanding",
    "I1 completions": "no completion is trained on twice, none is lost within its group",
    "I1 order": "prompts are issued, consumed and dropped in one order",
    "I1 rollback": "what was consumed after a restored checkpoint is void, its prompts are issued again",
    "I2 staleness": "no sample is older than max_staleness when it is trained on",
    "I3 fingerprints": "each published version has one fingerprint, and no other version has it",
    "I3 attested": "a worker's samples are of published weights that this worker took over",
    "I4 checkpoints": "checkpoints are whole, `latest` names one, two at least are kept",
    "I4 cut": "the newest checkpoint holds what the journal says was outstanding",
    "I6 verdicts": "an error is never a reward, and says what it was",
    "I7 waits": "repeats, losses, drops and conditions name their reason",
    "attempts": "attempts follow each other, events are numbered without gaps, every end is recorded",
    "I10 success": "a run that succeeded has taken all its steps, at least one",
}
"""The rows, in their order. I5 is counted as a note; I8 and I9 leave no trace in a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One violation."""

    invariant: str
    """A key of INVARIANTS."""
    what: str
    lines: tuple[int, ...]
    """Of journal.jsonl, from 1, oldest first; empty if it shows in the checkpoints only."""


@dataclass(kw_only=True, slots=True)
class Report:
    """The result of an audit."""

    checked: Counter[str] = field(default_factory=Counter)
    """How often each invariant was looked at; in the unit of its row (prompts, completions, versions, ...)."""
    violations: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    """The first KEPT of each invariant, in order of their discovery."""
    totals: Counter[str] = field(default_factory=Counter)
    """What the run did: issued, consumed, dropped, void, outstanding, samples, lost, doubled, steps, attempts, ..."""
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.violations

    def violated(self, invariant: str, what: str, *lines: int | None) -> None:
        """Record a violation and the lines that show it."""
        assert invariant in INVARIANTS, invariant
        self.violations[invariant] += 1
        if self.violations[invariant] <= KEPT:
            shown = tuple(sorted({line for line in lines if line}))
            self.findings.append(Finding(invariant=invariant, what=what, lines=shown))

    def rows(self) -> list[tuple[str, str, int, int]]:
        """(invariant, meaning, times checked, violations) of every invariant."""
        return [(key, text, self.checked[key], self.violations[key]) for key, text in INVARIANTS.items()]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": self.passed,
            "totals": dict(self.totals),
            "invariants": [
                {"invariant": key, "meaning": text, "checked": checked, "violations": violations}
                for key, text, checked, violations in self.rows()
            ],
            "violations": [
                {"invariant": one.invariant, "what": one.what, "lines": list(one.lines)} for one in self.findings
            ],
            "notes": self.notes,
        }
