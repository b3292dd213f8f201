"""Commands for jobs on a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapo_ray.cli.options import AsJson, JobFile, JobId, Overrides, Wait, console, print_json, service
from sapo_ray.terminal import json_line, shown

if TYPE_CHECKING:
    from sapo_ray.api.jobs import Job, ObservedWorkers, State

WAIT_S = 30 * 86400.0
"""`--wait` and `watch` end after a month, whatever happens."""
LOG_POLL_S = 1.0

Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A mark of your own, for `jobs --label`.")
]


def submit(
    job: JobFile,
    set_: Overrides = None,
    wait: Wait = False,
    priority: Annotated[int, typer.Option(min=0, max=100, help="Higher is started first.")] = 50,
    label: Labels = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Two submissions with the same key are one job. Made if not given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only let the service check the job.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hand a job to the service and print its id; with --wait, show its progress until it ends."""
    from sapo_ray.config.job_file import read_job
    from sapo_ray.config.load import with_overrides

    with service() as client:
        spec = with_overrides(read_job(job), set_ or [], source=str(job))
        labels = _labels(label or [])
        if dry_run:
            checked = client.jobs.submit(spec, priority=priority, labels=labels, dry_run=True)
            if as_json:
                print_json(checked.model_dump(mode="json"))
            else:
                console.print(f"[green]valid[/]: {shown(str(job))}", highlight=False, soft_wrap=True)
            return
        made = client.jobs.submit(spec, priority=priority, labels=labels, idempotency_key=idempotency_key)
        if not wait:
            print_json(made.model_dump(mode="json")) if as_json else print(made.id)
            return
        if not as_json:
            print(made.id)
    _follow(made.id, as_json)


def jobs(
    state: Annotated[str | None, typer.Option(help="Only jobs in this state, e.g. running.")] = None,
    label: Annotated[str | None, typer.Option(metavar="KEY[=VALUE]", help="Only jobs with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with service() as client:
        found = list(client.jobs.list(state=state, label=label, limit=limit))
        if as_json:
            print_json([one.model_dump(mode="json") for one in found])
            return
        from sapo_ray.cli.showing import jobs_table

        if found:
            console.print(jobs_table(found))
        else:
            print("no jobs" if state is None and label is None else "no such jobs")


def get(job: JobId, as_json: AsJson = False) -> None:
    """Show one job: state, figures, conditions."""
    with service() as client:
        _show(client.jobs.get(job), as_json)


def watch(
    job: JobId,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """Show a job's progress from its beginning until it ends or is paused.

    Exit code: 0 succeeded, 1 failed, 2 refused (no such job, wrong key), 3 cancelled, 4 paused, 5 no service.
    """
    if as_json:
        with service() as client:
            found = client.jobs.wait(job, WAIT_S, lambda event: print(json_line(event.model_dump_json()), flush=True))
        raise typer.Exit(_exit_code(found.status.state))
    _follow(job, as_json=False)


def pause(
    job: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is paused: exit code 0, as if it succeeds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a job finish its step, make a checkpoint and give back all it holds."""
    with service() as client:
        found = client.jobs.pause(job)
        if wait:
            found = client.jobs.wait(job, WAIT_S)
        _show(found, as_json)
    if wait:
        raise typer.Exit(_exit_code(found.status.state, wanted="paused"))


def resume_job(job: str, wait: bool, as_json: bool) -> None:
    """The part of `resume` that is about jobs on a service."""
    with service() as client:
        found = client.jobs.resume(job)
        if not wait:
            _show(found, as_json)
            return
    _follow(job, as_json)


def cancel(
    job: JobId,
    discard: Annotated[bool, typer.Option("--discard", help="Also delete checkpoints and model.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended: exit code 0 if cancelled.")] = False,
    as_json: AsJson = False,
) -> None:
    """End a job. What it has learned is exported, unless --discard."""
    with service() as client:
        found = client.jobs.cancel(job, discard=discard)
        if wait:
            found = client.jobs.wait(job, WAIT_S, through_pause=True)
        _show(found, as_json)
    if wait:
        raise typer.Exit(_exit_code(found.status.state, wanted="cancelled"))


def checkpoint(job: JobId, as_json: AsJson = False) -> None:
    """Let a job make a checkpoint after the step under way."""
    with service() as client:
        _show(client.jobs.checkpoint(job), as_json)


def scale(
    job: JobId,
    target: Annotated[int | None, typer.Argument(metavar="[N]", help="Rollout workers wanted.")] = None,
    least: Annotated[int | None, typer.Option("--min", help="Fewest with which the job goes on.")] = None,
    most: Annotated[int | None, typer.Option("--max", help="Most it may ever have.")] = None,
    as_json: AsJson = False,
) -> None:
    """Change the number of rollout workers while the job runs; without N, tell it."""
    with service() as client:
        found = client.jobs.scale(job, target, min=least, max=most)
        if as_json:
            print_json(found.model_dump(mode="json"))
        else:
            print(f"{found.target} rollout workers wanted, of {found.min} to {found.max}{_counted(found.observed)}")


def _counted(observed: ObservedWorkers | None) -> str:
    """`; 1 ready, 2 starting`, as the driver last said."""
    if observed is None:
        return ""
    numbers = {name: number for name, number in observed.model_dump().items() if number or name == "ready"}
    aim = numbers.pop("wanted", 0)
    return f"; the driver aims at {aim}: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in numbers.items())


def delete(job: JobId) -> None:
    """Remove a job that has ended, with its checkpoints, its model and its events."""
    with service() as client:
        client.jobs.delete(job)
        print(f"{job} is deleted")


def samples(
    job: JobId,
    step: Annotated[int | None, typer.Option(min=1, help="Of this step; of the newest if not given.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many completions.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Show what the model writes: prompts, completions, verdicts."""
    with service() as client:
        wanted = step or client.jobs.get(job).status.step or None
        found = client.jobs.samples(job, step=wanted, limit=limit)
        if as_json:
            print_json(found)
            return
        for row in found:
            _print_sample(row)
        if not found:
            print("no samples yet")


def export(
    job: JobId,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to put it; made if needed.")],
    as_json: AsJson = False,
) -> None:
    """Fetch the trained model (Hugging Face format). Broken off, it goes on where it stopped when called again."""
    with service("interrupted; the same command goes on where it stopped") as client:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            disable=as_json or not console.is_terminal,
        )
        with bars:
            tasks = {}

            def progress(path: str, have: int, size: int) -> None:
                if path not in tasks:
                    tasks[path] = bars.add_task(shown(path), total=size)
                bars.update(tasks[path], completed=have)

            files = client.jobs.download_export(job, folder, progress)
        if as_json:
            print_json([str(path) for path in files])
        else:
            print(f"{len(files)} files in {folder}")


def _follow(job_id: str, as_json: bool) -> None:
    """Show the progress of a job to its end, and exit by how it ended."""
    going_on = f"{job_id} goes on; `sapo-ray watch {job_id}` shows it again, `sapo-ray cancel {job_id}` ends it"
    with service(going_on) as client:
        if as_json:
            found = client.jobs.wait(job_id, WAIT_S)
            print_json(found.model_dump(mode="json"))
        else:
            from sapo_ray.cli.showing import JobDisplay, print_end

            with JobDisplay(console) as display:
                found = client.jobs.wait(job_id, WAIT_S, display)
            print_end(console, found)
    raise typer.Exit(_exit_code(found.status.state))


def _show(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job.model_dump(mode="json"))
        return
    from sapo_ray.cli.showing import job_table

    console.print(job_table(job))


def _exit_code(state: State, wanted: State = "succeeded") -> int:
    """0 where a job came to what was asked for, else how it ended."""
    from sapo_ray.cli.showing import EXIT_CODES

    return 0 if state == wanted else EXIT_CODES[state]


def _labels(given: list[str]) -> dict[str, str]:
    from sapo_ray.errors import ConfigError

    labels = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise ConfigError(f"--label must be KEY=VALUE, got {one!r}")
        labels[key] = value
    return labels


def _print_sample(row: dict[str, Any]) -> None:
    reward = "-" if row.get("reward") is None else f"{row['reward']:.3g}"
    head = f"step {row.get('step')}  group {row.get('group')}  #{row.get('i')}  {row.get('verdict')}  reward {reward}"
    console.rule(shown(head), align="left")
    for name in ("prompt", "completion", "gold", "reason"):
        if row.get(name):
            console.print(f"[bold]{name}[/] {shown(str(row[name]))}", highlight=False, soft_wrap=True)
