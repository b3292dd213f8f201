"""`sapo-ray audit`: were a run's promises kept?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sapo_ray.cli.options import AsJson, console
from sapo_ray.ending import user_errors
from sapo_ray.terminal import shown

if TYPE_CHECKING:
    from sapo_ray.audit import Report

SHOWN = 20
"""Violations that are printed; --json has more."""


def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: of `train`, or of a job of a service.")],
    as_json: AsJson = False,
) -> None:
    """Check from journal and checkpoints alone that nothing was lost, doubled or too old. Exit code 1 if it was.

    Only reads, so the run may be under way. Every violation is shown with its lines of journal.jsonl.
    """
    from sapo_ray.audit import audit as check

    with user_errors():
        report = check(run)
        if as_json:
            print(json.dumps(report.as_dict(), indent=1))
        else:
            _print(report, run)
    if not report.passed:
        raise typer.Exit(1)


def _print(report: Report, run: Path) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("invariant", "meaning", "checked", "violations"):
        table.add_column(heading, justify="right" if heading in ("checked", "violations") else "left")
    for invariant, meaning, checked, violations in report.rows():
        style = "red" if violations else "" if checked else "dim"
        table.add_row(invariant, meaning, str(checked), str(violations), style=style)
    console.print(table)
    totals = report.totals
    names = ("issued", "consumed", "dropped", "outstanding", "void", "lost", "doubled")
    print("prompts: " + ", ".join(f"{totals[name]} {name}" for name in names))
    names = ("samples", "samples dropped", "samples lost", "samples doubled", "worker losses", "rollbacks", "attempts")
    print(", ".join(f"{totals[name]} {name}" for name in names))
    for note in report.notes:
        console.print(f"[yellow]note:[/] {shown(note)}", highlight=False)
    for finding in report.findings[:SHOWN]:
        where = ", ".join(map(str, finding.lines))
        place = f" (line{'s' if len(finding.lines) > 1 else ''} {where})" if where else ""
        console.print(f"[red]{finding.invariant}:[/] {shown(finding.what)}{place}", highlight=False, soft_wrap=True)
    count = report.violations.total()
    if count > SHOWN:
        print(f"... and {count - SHOWN} more; --json lists them")
    verdict = "[green]every promise was kept[/]" if report.passed else f"[red]{count} violations[/]"
    console.print(f"{verdict}: {shown(str(run))}", highlight=False, soft_wrap=True)
