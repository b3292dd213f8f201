"""`logs`: what a job's processes printed, also while they do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from sapo_ray.cli.options import AsJson, JobId, console, print_json, service
from sapo_ray.terminal import LogText

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
    """List a job's log files, or print one of them.

    On a terminal without colours, and with control characters written out; into a file or a pipe byte for byte.
    """
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
    write = _writer()
    end = time.monotonic() + FOLLOW_S
    while time.monotonic() < end:
        over = not follow or client.jobs.get(job).status.state in _still()
        while True:
            part = client.jobs.log(job, name, offset)
            write(part.data)
            moved, offset = bool(part.data), part.next_offset
            if not moved:
                break
        if over:
            write(None)
            return
        time.sleep(POLL_S)


def _writer() -> Callable[[bytes | None], None]:
    """Prints parts of a log; None ends it. To a terminal what is safe there, to a file or a pipe byte for byte."""
    text = LogText() if sys.stdout.isatty() else None

    def write(data: bytes | None) -> None:
        if text is not None:
            sys.stdout.write(text.rest() if data is None else text.feed(data))
            sys.stdout.flush()
        elif data is not None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    return write


def _still() -> frozenset[str]:
    """States in which nothing is written any more."""
    from sapo_ray.client import TERMINAL

    return TERMINAL | {"paused"}
