"""Published weights: which versions live, what their fingerprints are, and which workers took them over.

A version is written `attempt.number`, with `.lineage` after a restore within the attempt. A rollback to step s abandons
every version with a larger number: what was sampled under them may not be trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

from sapo_ray.audit.findings import Report
from sapo_ray.audit.lines import Line

REMEMBERED = 16
"""Versions, beyond max_staleness, whose workers are remembered."""


@dataclass(kw_only=True, slots=True)
class _Version:
    fingerprint: str
    line: int
    """Where it was published first."""
    alive: bool = True


class Weights:
    """Versions and who holds them."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._versions: dict[str, _Version] = {}
        self._by_fingerprint: dict[str, str] = {}
        self._attested: dict[str, set[str]] = {}
        """Version -> workers that took it over, of the newest versions."""
        self._refused: dict[tuple[str, str], int] = {}
        """(version, worker) that failed -> line, of the newest versions."""
        self._staleness = 0

    def see(self, line: Line) -> None:
        """The next line."""
        data = line.data
        if line.kind == "published":
            self._published(line, str(data["version"]), str(data["fingerprint"]))
            self._attested.setdefault(data["version"], set()).update(data["workers"])
        elif line.kind == "worker" and data["what"] in ("worker_ready", "worker_caught_up"):
            self._attested.setdefault(data["version"], set()).add(data["worker"])
        elif line.kind == "worker" and data["what"] == "takeover_failed":
            self._refused[data["version"], data["worker"]] = line.number
        elif line.kind == "rollback":
            for name, version in self._versions.items():
                version.alive = version.alive and number_of(name) <= int(data["to_step"])
        elif line.kind == "bounds":
            self._staleness = int(data["max_staleness"])

    def _published(self, line: Line, name: str, fingerprint: str) -> None:
        self.report.checked["I3 fingerprints"] += 1
        self.report.totals["versions"] += 1
        if _order(name)[0] != line.attempt:
            self.report.violated("I3 fingerprints", f"attempt {line.attempt} published version {name}", line.number)
        known, owner = self._versions.get(name), self._by_fingerprint.setdefault(fingerprint, name)
        if owner != name:
            self.report.violated(
                "I3 fingerprints",
                f"version {name} has the fingerprint {fingerprint} of version {owner}",
                self._versions[owner].line,
                line.number,
            )
        if known is not None and known.alive:
            self.report.violated("I3 fingerprints", f"version {name} was published twice", known.line, line.number)
        if known is not None and known.fingerprint != fingerprint:
            self.report.violated(
                "I3 fingerprints",
                f"version {name} has two fingerprints, {known.fingerprint} and {fingerprint}",
                known.line,
                line.number,
            )
        self._versions[name] = _Version(fingerprint=fingerprint, line=known.line if known else line.number)
        if len(self._attested) > 2 * (self._staleness + REMEMBERED):
            # In order of their publish: after a rollback numbers come again, smaller than those that it abandoned.
            for forgotten in list(self._attested)[: self._staleness + REMEMBERED]:
                del self._attested[forgotten]
            kept = self._attested.keys()
            self._refused = {key: number for key, number in self._refused.items() if key[0] in kept}

    def problem(self, name: str, worker: str) -> tuple[str, int | None] | None:
        """Why what `worker` sampled under version `name` may not be used, and the line to see; None if it may."""
        version = self._versions.get(name)
        if version is None:
            return f"under version {name}, which was never published", None
        if not version.alive:
            return f"under version {name}, which a rollback had abandoned", version.line
        holders = self._attested.get(name)
        if holders is None or worker in holders:  # older than what is remembered: then it is too old as well
            return None
        refused = self._refused.get((name, worker))
        why = "whose takeover had failed" if refused else "which it had not taken over"
        return f"under version {name}, {why}", refused or version.line


def number_of(version: str) -> int:
    """Of `attempt.number`, or `attempt.number.lineage`."""
    return _order(version)[1]


def _order(version: str) -> tuple[int, ...]:
    """(attempt, number), and lineage if it is not 0."""
    parts = tuple(int(part) for part in version.split("."))
    if len(parts) not in (2, 3):
        raise ValueError(f"{version!r} is no version")
    return parts
