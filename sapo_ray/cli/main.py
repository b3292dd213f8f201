"""The application: which commands there are. Commands import what they need when they run, so that `--help` is instant.

training.py     train resume validate eval      one job on this machine, without a service
jobs.py         submit jobs get watch ...       jobs on a service (SAPO_URL, SAPO_API_KEY)
logs.py         logs
diagnose.py     diagnose                        what is the matter with a job, or a run
service.py      serve migrate keys datasets ...  the service itself
doctor.py       doctor                          what the service and its jobs stand on
quickstart.py   quickstart                      a service for one job, from start to end
tools.py        gates grade                     parts by themselves
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from sapo_ray import __version__
from sapo_ray.cli import auditing, diagnose, doctor, jobs, logs, quickstart, service, tools, training

RUNS = "One job on this machine"
JOBS = "Jobs on a service (SAPO_URL, SAPO_API_KEY)"
SERVICE = "The service"
TOOLS = "Parts by themselves"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models by reinforcement learning; never lose a sample.\n\n"
    "Start with: sapo-ray train configs/quickstart.yaml, or with a service: sapo-ray quickstart",
    epilog="Exit codes: 0 done; 1 something you can mend, the message says what; 2 wrong usage; 130 Ctrl-C; "
    "143 SIGTERM. After 130 and 143 a run goes on by `sapo-ray resume RUN`. Commands for a service: 2 wrong usage, or "
    "refused by the service; 5 the service cannot be reached or does not answer; with --wait and for `watch` also "
    "1 the job failed, 3 it was cancelled, 4 it is paused.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    RUNS: (training.train, training.resume, training.validate, training.evaluate, auditing.audit),
    JOBS: (
        *(jobs.submit, jobs.jobs, jobs.get, jobs.watch, diagnose.diagnose, logs.logs, jobs.samples, jobs.export),
        *(jobs.pause, jobs.cancel, jobs.checkpoint, jobs.scale, jobs.delete),
    ),
    SERVICE: (
        *(service.serve, service.migrate, service.apply_cluster, quickstart.quickstart, service.models),
        doctor.doctor,
    ),
    TOOLS: (tools.gates, tools.grade),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command("eval" if command is training.evaluate else None, rich_help_panel=panel)(command)
app.add_typer(service.datasets, name="datasets", rich_help_panel=SERVICE)
app.add_typer(service.keys, name="keys", rich_help_panel=SERVICE)


def main() -> None:
    """Entry point of the `sapo-ray` command."""
    # Libraries' own progress bars would run through ours; set before any of them is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
