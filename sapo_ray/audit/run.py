"""`sapo-ray audit RUN`: were the promises kept? From the journal and the checkpoints alone.

    journal.jsonl --one line at a time--> Attempts      who wrote when, how each attempt ended, what is named
                                     |--> Weights       versions, fingerprints, who took them over
                                     '--> Ledger        prompts and completions along the surviving lineage
    checkpoints/ -----------------------> checkpoints   whole, kept, and at one with the ledger

Independent of what it audits: it shares with the driver the format of the files and nothing else, and keeps books of
its own. It only reads, so a run may be under way; what that run has not made durable yet is not seen.

Held in memory, whatever the journal's length: outstanding groups and those of the kept checkpoints, the ids of two
epochs of prompts, the last SETTLED groups that were consumed or dropped (to name their lines), and for each published
version its fingerprint (about 100 bytes).
"""

from __future__ import annotations

from pathlib import Path

from sapo_ray.audit.attempts import Attempts
from sapo_ray.audit.checkpoints import check_checkpoints
from sapo_ray.audit.findings import Report
from sapo_ray.audit.ledger import Ledger
from sapo_ray.audit.lines import Line, lines
from sapo_ray.audit.versions import Weights
from sapo_ray.errors import CheckpointError


def audit(run_dir: Path) -> Report:
    """Check every invariant that a run directory shows.

    Raises:
        CheckpointError: the journal is missing, damaged, or of another version.
    """
    path = run_dir / "journal.jsonl"
    report = Report()
    attempts, weights = Attempts(report), Weights(report)
    ledger = Ledger(report, weights)
    number = 0
    for line in lines(path):
        number = line.number
        try:
            _see(line, attempts, weights, ledger)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{path}:{line.number}: a {line.kind} line that cannot be read ({error!r}); the file was damaged: "
                "restore it from a copy"
            ) from error
    if number == 0:
        raise CheckpointError(f"{path} has no whole line: the run wrote nothing, there is nothing to audit")
    attempts.finish(ledger.step, ledger.bounds.get("steps"))
    ledger.finish(succeeded=attempts.ended_as == "succeeded")
    check_checkpoints(run_dir / "checkpoints", ledger.cuts, report)
    report.totals["lines"] = number
    return report


def _see(line: Line, attempts: Attempts, weights: Weights, ledger: Ledger) -> None:
    attempts.see(line)
    weights.see(line)
    ledger.see(line)
