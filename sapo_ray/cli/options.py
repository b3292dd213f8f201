"""What commands have in common: the terminal, options, and how a command that speaks to a service ends."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sapo_ray.errors import SapoRayError
from sapo_ray.terminal import json_line, printable

if TYPE_CHECKING:
    from sapo_ray.client import Client

console = Console()
REFUSED = 2
"""As for wrong usage: the job, the key, the id or the moment is wrong; the message says which."""
UNANSWERED = 5
"""The service cannot be reached, or does not answer as it should: nothing is known about the job."""

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the job, e.g. --set seed=1. Repeatable."),
]
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job: see docs/jobs.md and configs/.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `submit` and `jobs` print it.")]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait",
        help="Wait for the end. Exit code: 0 succeeded, 1 failed, 2 refused, 3 cancelled, 4 paused, 5 no service.",
    ),
]
JOB_ID = re.compile(r"job-[0-9a-z]{20}")


@contextmanager
def service(going_on: str | None = None) -> Iterator[Client]:
    """A client by SAPO_URL and SAPO_API_KEY; errors are one line on stderr and exit code 2 or 5, Ctrl-C is 130.

    `going_on` is what to tell whoever presses Ctrl-C: the job does not end with the command.
    """
    try:
        from sapo_ray.client import Client

        with Client() as client:
            yield client
    except SapoRayError as error:
        Console(stderr=True).print("[red]error:[/]", end=" ", highlight=False)
        print(printable(str(error)), file=sys.stderr)
        raise typer.Exit(_code_of(error)) from error
    except KeyboardInterrupt as error:
        print(going_on or "interrupted", file=sys.stderr)
        raise typer.Exit(130) from error


def print_json(value: Any) -> None:
    """One JSON document, nothing else."""
    import json

    print(json_line(json.dumps(value, indent=1, ensure_ascii=False)))


def _code_of(error: SapoRayError) -> int:
    """What a command ends with that could not do its work: 1 is left to jobs that failed."""
    from sapo_ray.client import ApiError, BadReply, ConnectionFailed, RateLimited
    from sapo_ray.errors import DeadlineExceeded

    no_answer = isinstance(error, ConnectionFailed | BadReply | RateLimited | DeadlineExceeded)
    return UNANSWERED if no_answer or (isinstance(error, ApiError) and error.status >= 500) else REFUSED
