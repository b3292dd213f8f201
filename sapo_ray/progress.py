"""What a person sees of a run: a bar per phase while it goes, a table when it is done. Fed by the run's events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from sapo_ray.terminal import printable, shown

PHASES = {
    "model": "model and data",
    "start": "starting engines",
    "recover": "restarting learner",
    "evaluate_before": "accuracy before",
    "train": "training",
    "evaluate": "held-out accuracy",
    "evaluating": "held-out accuracy",
    "evaluate_after": "accuracy after",
    "export": "exporting model",
    "output": "copying model",
}
PLAIN_EVERY = 5
"""Without a terminal, one line so many steps."""
PLAIN_PROMPTS = 100
"""Without a terminal, one line so many prompts of an evaluation."""
TROUBLE = {
    "worker_lost": "was lost",
    "takeover_failed": "failed to take the weights over",
    "worker_behind": "is left behind until it has the newest weights",
    "worker_not_replaced": "is not replaced",
    "pool_failed": "failed",
}
"""What happened to a worker, of all events about workers those that a person should see."""


class ProgressDisplay:
    """Listens to events. On a terminal: live bars; elsewhere: one line at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            # What is not bounded here takes the room of the bars and times on a narrow terminal.
            TextColumn("{task.description}", table_column=Column(min_width=17, no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(min_width=14, ratio=1)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, max_width=36)),
            TimeElapsedColumn(table_column=Column(min_width=7, no_wrap=True)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._current: str | None = None
        self._accuracy = ""

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of the journal."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    def _on_phase(self, event: dict[str, Any]) -> None:
        phase = event["phase"]
        if phase == "evaluate":  # in mid-training: shown beside the training bar, not as a bar of its own
            return
        self._finish()
        self._current = phase
        total = event.get("steps")
        self._tasks[phase] = self._bars.add_task(
            shown(PHASES.get(phase, phase)), total=total, completed=event.get("step", 0) if total else 0, note=""
        )
        self._plain(f"{PHASES.get(phase, phase)} ...")

    def _finish(self) -> None:
        if self._current is not None:
            task = self._tasks[self._current]
            self._bars.update(task, total=1, completed=1) if self._bars.tasks[task].total is None else None
            self._bars.stop_task(task)

    def _on_warm_start(self, event: dict[str, Any]) -> None:
        accuracy = "" if event["accuracy"] is None else f", sampled accuracy {event['accuracy']:.2f}"
        self._note(f"step {event['step']}{accuracy}")

    def _on_step(self, event: dict[str, Any]) -> None:
        metrics = event["metrics"]
        task = self._tasks.get("train")
        if task is not None:
            self._bars.update(task, completed=event["step"])
        note = f"{event['step']}/{event['steps']}  reward {metrics['reward/mean']:.3f}{self._accuracy}"
        self._note(note, plain=event["step"] % PLAIN_EVERY == 0 or event["step"] == event["steps"])

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        greedy = event["greedy"]["mean"]
        self._accuracy = f"  held-out {greedy:.3f}"
        self._plain(f"step {event['step']}: held-out accuracy {greedy:.3f}")

    def _on_evaluating(self, event: dict[str, Any]) -> None:
        done, prompts = event["done"], event["prompts"]
        self._bars.update(self._tasks["evaluating"], total=prompts, completed=done)
        self._note(f"{event['completions']}  {done}/{prompts}", plain=done == prompts or done % PLAIN_PROMPTS == 0)

    def _on_condition(self, event: dict[str, Any]) -> None:
        if event["condition"] == "Advice":
            self._say(f"[yellow]note:[/] {shown(str(event['reason']))}")
            return
        details = ", ".join(
            f"{key} {value}"
            for key, value in event.items()
            if key not in ("time", "attempt", "seq", "kind", "condition")
        )
        self._say(f"[yellow]{shown(str(event['condition']))}[/]: {shown(details)}")

    def _on_worker(self, event: dict[str, Any]) -> None:
        happened = TROUBLE.get(event["what"])
        if happened is not None:
            reason = f": {event['reason']}" if event.get("reason") else ""
            text = f"{event['worker']} {happened}{reason}"
            self._say(f"[yellow]worker[/] {shown(text)}")

    def _on_rollback(self, event: dict[str, Any]) -> None:
        self._say(f"going on from step {int(event['to_step'])} ({shown(event['checkpoint'] or 'no checkpoint')})")

    def _on_transition(self, event: dict[str, Any]) -> None:
        if event["state"] == "starting":
            self._say(f"run {shown(event['run_dir'])}")
        if event["state"] in ("succeeded", "failed", "interrupted"):
            self._finish()

    def _note(self, text: str, *, plain: bool = True) -> None:
        if self._current is not None:
            self._bars.update(self._tasks[self._current], note=shown(text))
        if plain:
            self._plain(text)

    def _say(self, markup: str) -> None:
        self._console.print(markup, highlight=False, soft_wrap=True)

    def _plain(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(printable(text), highlight=False, markup=False)


def print_result(console: Console, result: dict[str, Any]) -> None:
    """The tables at the end of a run."""
    before, after = result["accuracy"]["before"], result["accuracy"]["after"]
    if after is not None:
        table = Table(title="held-out accuracy, 95% intervals", title_justify="left")
        for column in ("", "before", "after", "prompts", "errors"):
            table.add_column(column, justify="left" if not column else "right")
        for label, old, new in accuracy_rows(before, after):
            counts = (str(new["prompts"]), str(new["errors"]))
            table.add_row(shown(label), "-" if old is None else shown(interval(old)), shown(interval(new)), *counts)
        console.print(table)
        if any(new["errors"] for _, _, new in accuracy_rows(before, after)):
            console.print("errors: completions without a verdict; they are in no accuracy")
        if count := sum(new.get("unverifiable", 0) for new in (after["greedy"], after["sampled"]) if new):
            console.print(f"{count} answers too slow, too long or too heavy to be graded were counted as wrong")
    times = Table(title="where the time went", title_justify="left")
    times.add_column("phase")
    times.add_column("seconds", justify="right")
    for phase, seconds in result["seconds"].items():
        times.add_row(shown(phase), f"{seconds:.1f}")
    times.add_row("all", f"{sum(result['seconds'].values()):.1f}")
    console.print(times)
    console.print(f"run       {shown(result['run_dir'])}", highlight=False, soft_wrap=True)
    console.print(f"model     {shown(result['export'])}  (Hugging Face format)", highlight=False, soft_wrap=True)
    if "output" in result:
        console.print(f"copy      {shown(result['output'])}", highlight=False, soft_wrap=True)


def accuracy_rows(before: dict[str, Any] | None, after: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(label, before, after) of every accuracy: overall first, then each source."""
    for kind in ("greedy", "sampled"):
        if after[kind] is not None:
            yield kind, before and before[kind], after[kind]
    for source, kinds in after["by_source"].items():
        for kind, new in kinds.items():
            yield f"{source}, {kind}", before and before["by_source"].get(source, {}).get(kind), new


def interval(accuracy: dict[str, Any]) -> str:
    """`0.312 [0.274, 0.353]`"""
    return f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
