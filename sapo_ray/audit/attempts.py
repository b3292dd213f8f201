"""Attempts: who wrote when, how each ended, and whether what went wrong has a name."""

from __future__ import annotations

from sapo_ray.audit.findings import Report
from sapo_ray.audit.lines import Line

ENDS = ("succeeded", "failed", "interrupted", "paused", "cancelled")
"""States of an attempt's last transition."""
LEDGER_OF_TRAINING = ("issued", "graded", "consumed", "published")
NEEDS_REASON = ("worker_lost", "takeover_failed", "worker_behind", "worker_not_replaced", "pool_failed")


class Attempts:
    """Attempts in their order: one writer at a time, contiguous events, an end that is recorded."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._attempt = 0
        self._seq = 0
        self._last = 0
        self._ended: tuple[str, int] | None = None
        self._quarantined: set[str] = set()
        """Groups whose quarantine was announced: few, or the run ends."""

    @property
    def ended_as(self) -> str | None:
        """State of the newest attempt's end, if it has one."""
        return self._ended[0] if self._ended else None

    def see(self, line: Line) -> None:
        """The next line."""
        if line.attempt < self._attempt:
            what = f"attempt {line.attempt} wrote after attempt {self._attempt} had taken the run over"
            self._violated(what, self._last, line.number)
            return
        if line.attempt > self._attempt:
            self._begin(line)
        self._last = line.number
        if line.seq is not None:
            self._number(line, line.seq)
        if self._ended is not None and line.kind in LEDGER_OF_TRAINING:
            self._violated(
                f"attempt {line.attempt} went on training after it had {self._ended[0]}", *self._ended[1:], line.number
            )
        if line.kind == "transition" and line.data["state"] in ENDS:
            self._end(line)
        self._reasons(line)

    def _begin(self, line: Line) -> None:
        if self._attempt and self._ended is None:  # killed; the ledger sees to it that a rollback follows
            self._report.totals["attempts without an end"] += 1
        self._report.totals["attempts"] += 1
        self._report.checked["attempts"] += 1
        self._attempt, self._seq, self._ended = line.attempt, 0, None

    def _number(self, line: Line, seq: int) -> None:
        if seq != self._seq + 1:
            self._violated(
                f"event {seq} of attempt {line.attempt} where {self._seq + 1} is due: events are missing or doubled",
                self._last if seq > 1 else None,
                line.number,
            )
        self._seq = seq

    def _end(self, line: Line) -> None:
        state = line.data["state"]
        if self._ended is not None:
            self._violated(
                f"attempt {line.attempt} ended twice: {self._ended[0]}, then {state}", self._ended[1], line.number
            )
        if not line.data.get("reason"):
            self._report.violated("I7 waits", f"attempt {line.attempt} {state} without a reason", line.number)
        self._ended = (state, line.number)

    def _reasons(self, line: Line) -> None:
        """I7: whatever was waited for in vain, lost or given up has a name."""
        data, what = line.data, line.data.get("what")
        if line.kind in ("reissued", "waited", "dropped") or (line.kind == "worker" and what in NEEDS_REASON):
            self._report.checked["I7 waits"] += 1
            if not data.get("reason"):
                name = data.get("group") or data.get("worker")
                self._report.violated("I7 waits", f"{what or line.kind} of {name} without a reason", line.number)
        if line.kind == "condition":
            self._report.checked["I7 waits"] += 1
            if not data["condition"]:
                self._report.violated("I7 waits", "a condition without a name", line.number)
            if data["condition"] == "Quarantined":
                self._quarantined.add(data["group"])
        if line.kind == "dropped" and data["reason"] == "quarantined" and data["group"] not in self._quarantined:
            self._report.violated("I7 waits", f"{data['group']} was quarantined and no condition says why", line.number)
        self._report.totals["worker losses"] += what == "worker_lost"
        self._report.totals["reissues"] += line.kind == "reissued"

    def finish(self, step: int, steps: int | None) -> None:
        """After the last line; `step` is the newest that counts, `steps` what the job wants."""
        if self._ended is None:
            self._report.notes.append(
                f"attempt {self._attempt} has no end: it is under way, or was killed and not taken up again"
            )
            return
        state, line = self._ended
        if state != "succeeded":
            return
        self._report.checked["I10 success"] += 1
        if step == 0:
            self._report.violated("I10 success", "the run succeeded without a step that counts", line)
        elif step != steps:
            self._report.violated("I10 success", f"the run succeeded after {step} of {steps} steps", line)

    def _violated(self, what: str, *lines: int | None) -> None:
        self._report.violated("attempts", what, *lines)
