"""`logs`: what a job's processes printed, also while they do."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from sapo_ray.cli.options import AsJson, JobId, console, print_json, service

if TYPE_CHECKING:
    from sapo_ray.client import Client

POLL_S = 1.0
FOLLOW_S = 30 * 86400.0
"""`--follow` ends after a month, whatever happens."""


def logs(
    job: JobId,
    name: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A file of the list that `logs JOB` prints.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print on as it grows, until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option(min=1, metavar="KB", help="Only the last kilobytes.")] = None,
    as_json: AsJson = False,
) -> None:
    """List a job's log files, or print one of them."""
    with service() as client:
        if name is None:
            _list(client, job, as_json)
            return
        _print(client, job, name, 0 if tail is None else -1024 * tail, follow)


def _list(client: Client, job: str, as_json: bool) -> None:
    found = client.jobs.logs(job)
    if as_json:
        print_json(found)
        return
    from sapo_ray.cli.showing import rows_table

    if not found:
        print("no logs yet")
        return
    console.print(rows_table(found, ("name", "bytes")))


def _print(client: Client, job: str, name: str, offset: int, follow: bool) -> None:
    """The file from `offset` on; with `follow` until the job has ended and everything was printed."""
    end = time.monotonic() + FOLLOW_S
    while time.monotonic() < end:
        over = not follow or client.jobs.get(job).status.state in _still()
        while True:
            part = client.jobs.log(job, name, offset)
            sys.stdout.buffer.write(part.data)
            sys.stdout.buffer.flush()
            moved, offset = bool(part.data), part.next_offset
            if not moved:
                break
        if over:
            return
        time.sleep(POLL_S)


def _still() -> frozenset[str]:
    """States in which nothing is written any more."""
    from sapo_ray.client import TERMINAL

    return TERMINAL | {"paused"}
