"""Jobs of a service as a person sees them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from sapo_ray.progress import ProgressDisplay, print_result
from sapo_ray.terminal import shown

if TYPE_CHECKING:
    from sapo_ray.api.jobs import Event, Job

EXIT_CODES = {"succeeded": 0, "failed": 1, "cancelled": 3, "paused": 4}
COLOURS = {"succeeded": "green", "running": "cyan", "failed": "red", "recovering": "yellow", "paused": "yellow"}
NOTHING = "-"


class JobDisplay:
    """The progress display of `train`, fed by the events of a job on a service."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._display = ProgressDisplay(console)
        self._state = ""

    def __enter__(self) -> JobDisplay:
        self._display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.__exit__(*error)

    def __call__(self, event: Event) -> None:
        """Take one event."""
        try:
            if event.kind == "transition":
                self._transition(event.data)
            else:
                self._display(journal_event(event))
        except (KeyError, TypeError, ValueError) as error:  # a driver of another version; the watching goes on
            self._say(f"event {event.id} ({event.kind}) cannot be shown: {error!r}")

    def _transition(self, data: dict[str, Any]) -> None:
        state, reason = str(data["state"]), data.get("reason")
        if state not in ("queued", "starting", "running"):  # whatever was under way is not any more
            self._display({"kind": "transition", "state": "interrupted"})
        if state != self._state:
            self._say(f"{state}: {reason}" if reason else state)
        self._state = state

    def _say(self, text: str) -> None:
        self._console.print(shown(text), highlight=False, soft_wrap=True)


def journal_event(event: Event) -> dict[str, Any]:
    """The event as the driver's journal has it, which is what the progress display knows."""
    return {**event.data, "time": event.time.timestamp(), "attempt": event.attempt, "kind": event.kind}


def print_end(console: Console, job: Job) -> None:
    """How a job ended, and what can be done next."""
    result = job.status.result or {}
    if all(key in result for key in ("accuracy", "seconds", "run_dir", "export")):
        print_result(console, result)
    colour = COLOURS.get(job.status.state, "yellow")
    text = f"{job.id} [{colour}]{job.status.state}[/]: {shown(job.status.reason)}"
    console.print(text, highlight=False, soft_wrap=True)
    ways = {
        "succeeded": f"fetch the model by: sapo-ray export {job.id} FOLDER",
        "failed": f"look at: sapo-ray logs {job.id}",
        "paused": f"go on by: sapo-ray resume {job.id}",
    }
    if job.status.state in ways:
        console.print(ways[job.status.state], highlight=False, soft_wrap=True)


def jobs_table(jobs: Iterable[Job]) -> Table:
    """One line a job; fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", no_wrap=True, min_width=24)
    table.add_column("name", overflow="ellipsis", max_width=24)  # the only one that may be cut
    table.add_column("state", no_wrap=True)
    for name in ("step", "reward", "acc.", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        status, figures = job.status, job.status.summary
        place = f" #{status.position}" if status.position is not None else ""
        state = f"[{COLOURS.get(status.state, 'default')}]{status.state}[/]{place}"
        numbers = (_number(figures.reward), _number(figures.accuracy), age(job.created_at))
        table.add_row(job.id, shown(job.name), state, f"{status.step}/{status.steps}", *numbers)
    return table


def job_table(job: Job) -> Table:
    """Everything that a person wants to know of one job."""
    status, figures, scale = job.status, job.status.summary, job.desired.scale
    place = f", place {status.position} in the queue" if status.position is not None else ""
    rows = [
        ("job", f"{job.id}  {job.name}"),
        ("state", f"{status.state}{place}: {status.reason}"),
        ("since", f"{status.since.astimezone():%Y-%m-%d %H:%M:%S} ({age(status.since)})"),
        ("wanted", f"{job.desired.state}{', discard' if job.desired.discard else ''}"),
        ("steps", f"{status.step} of {status.steps}"),
        ("reward", _number(figures.reward)),
        ("accuracy", f"{_number(figures.accuracy_before)} before, {_number(figures.accuracy)} now"),
        ("tokens/s", NOTHING if figures.tokens_per_second is None else f"{figures.tokens_per_second:.0f}"),
        ("staleness", _number(figures.staleness)),
        ("verifier errors", NOTHING if figures.verifier_error_rate is None else f"{figures.verifier_error_rate:.1%}"),
        ("rollout workers", f"{figures.workers or NOTHING} now; {scale.target} wanted of {scale.min} to {scale.max}"),
        ("attempt", f"{status.attempt}, {status.restarts} restarts after failures"),
        ("priority", str(job.priority)),
        ("labels", ", ".join(f"{key}={value}" for key, value in job.labels.items()) or NOTHING),
        ("last heard", NOTHING if status.last_heard is None else f"{age(status.last_heard)} ago"),
    ]
    rows += [(one.type, one.reason) for one in status.conditions]
    return pairs(rows)


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, side by side."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(shown(name), shown(value))
    return table


def rows_table(rows: list[dict[str, Any]], columns: Iterable[str]) -> Table:
    """Some columns of many rows; what a row lacks is a dash."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(shown(name), overflow="fold", no_wrap=name == "id")  # ids are for copying
    for row in rows:
        table.add_row(*(shown(_cell(row.get(name))) for name in columns))
    return table


def age(then: datetime) -> str:
    """`12 s`, `5 min`, `3 h`, `8 d`: how long ago."""
    seconds = max(0.0, (datetime.now(UTC) - then).total_seconds())
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _cell(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
