"""`sapo-ray diagnose`: what is the matter with a job or a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sapo_ray.cli.options import JOB_ID, AsJson, console, print_json, service
from sapo_ray.errors import SapoRayError
from sapo_ray.terminal import printable, shown

if TYPE_CHECKING:
    from sapo_ray.api.diagnosis import Diagnosis

COLOURS = {"healthy": "green", "ended": "green", "waiting": "yellow", "stalled": "red", "failed": "red"}
EXIT_CODES = {"healthy": 0, "ended": 0, "waiting": 0, "stalled": 1, "failed": 1}


def diagnose(
    target: Annotated[str, typer.Argument(metavar="JOB|RUN", help="A job's id, or the folder of a run.")],
    as_json: AsJson = False,
) -> None:
    """Say which part of a job stalls or failed first, since when, and what to do. Exit code 1: stalled or failed.

    A folder needs no service: it tells also while the service, or the run's driver, does not answer.
    """
    found = _of_job(target) if JOB_ID.fullmatch(target) else _of_run(Path(target))
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _print(found)
    raise typer.Exit(EXIT_CODES[found.verdict])


def _of_job(job: str) -> Diagnosis:
    with service() as client:
        return client.jobs.diagnosis(job)


def _of_run(folder: Path) -> Diagnosis:
    from sapo_ray.diagnosis import diagnose as look
    from sapo_ray.diagnosis.run_dir import evidence

    try:
        return look(evidence(folder, time.time()))
    except SapoRayError as error:
        Console(stderr=True).print("[red]error:[/]", end=" ", highlight=False)
        print(printable(str(error)), file=sys.stderr)
        raise typer.Exit(1) from error


def _print(found: Diagnosis) -> None:
    def say(markup: str) -> None:
        console.print(markup, highlight=False, soft_wrap=True)

    say(f"[bold {COLOURS[found.verdict]}]{found.verdict}[/]  {shown(found.summary)}")
    say(f"since    {found.since.astimezone():%Y-%m-%d %H:%M:%S}")
    if found.cause is not None:
        say(f"cause    {found.cause.code} in {shown(found.cause.component)}: {shown(found.cause.text)}")
        if found.cause.lines:
            say(f"         last lines of logs/{shown(found.cause.log or '')}:")
        for line in found.cause.lines:
            say(f"           {shown(line)}")
    if found.remedy:
        say(f"to do    {shown(found.remedy)}")
    for one in found.components:
        usual = "-" if one.usual_s is None else f"{one.usual_s:.2g} s"
        mark = "[red]stalled[/]" if one.stalled else "at work"
        say(f"{mark}  {shown(one.name)}: {shown(one.task)}; quiet for {one.quiet_s:.0f} s, usual {usual}")
    for note in found.notes:
        say(f"note     {shown(note)}")
