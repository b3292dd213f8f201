"""Command line of sapo-ray. Commands import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from sapo_ray import __version__
from sapo_ray.errors import SapoRayError

if TYPE_CHECKING:
    from sapo_ray.config.spec import JobSpec

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models by reinforcement learning; never lose a sample.\n\n"
    "Start with: sapo-ray train configs/quickstart.yaml",
)
console = Console()

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the job, e.g. --set seed=1. Repeatable."),
]
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job: see docs/jobs.md and configs/.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """What the user can mend is a message and exit code 1; Ctrl-C is 130; the rest keeps its traceback."""
    try:
        yield
    except SapoRayError as error:
        Console(stderr=True).print(f"[red]error:[/] {type(error).__name__}", highlight=False)
        print(str(error), file=sys.stderr)
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit):
            raise
        print("interrupted; everything it started was ended", file=sys.stderr)
        raise typer.Exit(130) from error


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(job: JobFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Train a model by the job in JOB.yaml, on this machine or on the Ray cluster that RAY_ADDRESS names."""
    from sapo_ray.config.load import load_job

    with _user_errors():
        spec = load_job(job, set_ or [])
        from sapo_ray.driver import run

        _show(lambda listener: run.train(spec, listener), as_json)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of an earlier `train`.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its newest checkpoint. Steps, workers, checkpoints, evaluation and deadlines may change."""
    with _user_errors():
        from sapo_ray.driver import run

        _show(lambda listener: run.resume(run_dir, set_ or [], listener), as_json)


def _show(start: Any, as_json: bool) -> None:
    """Run with a progress display, or silently for JSON."""
    if as_json:
        print(json.dumps(start(None), indent=1))
        return
    from sapo_ray.progress import ProgressDisplay, print_result

    with ProgressDisplay(console) as display:
        result = start(display)
    print_result(console, result)


@app.command()
def validate(
    job: JobFile,
    set_: Overrides = None,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Also load model, tokenizer and data, and check every gold answer.")
    ] = False,
) -> None:
    """Check a job and estimate what it needs, without starting anything."""
    from sapo_ray.config.load import load_job

    with _user_errors():
        spec = load_job(job, set_ or [])
        from sapo_ray.algorithms.settings import advice

        console.print(f"[green]valid[/]: {job}", highlight=False)
        _print_estimate(spec)
        for warning in advice(spec):
            console.print(f"[yellow]note:[/] {warning}", highlight=False)
        if inputs:
            from sapo_ray.driver.inputs import prepare_inputs

            with tempfile.TemporaryDirectory(prefix="sapo-validate-") as folder:
                found = prepare_inputs(spec, Path(folder) / "model")
            print(f"  inputs: {len(found.prompts)} prompts, {found.prompts.skipped} skipped as too long, ", end="")
            print(f"{len(found.evaluation)} for evaluation; model and every reference answer can be used")


def _print_estimate(spec: JobSpec) -> None:
    from sapo_ray.config.architecture import find_architecture
    from sapo_ray.config.estimate import estimate

    architecture = find_architecture(spec.model)
    if architecture is None:
        print(f"  no estimate: the sizes of {spec.model.path} are not known without network; try a local folder")
        return
    needs = estimate(spec, architecture)
    for label, value in needs.table():
        print(f"  {label:<28} {value}")
    for assumption in needs.assumptions:
        print(f"  assumed: {assumption}")


@app.command("eval")
def evaluate(
    job: JobFile,
    model: Annotated[
        str | None, typer.Option(help="Model to evaluate instead of the job's, e.g. the export/ folder of a run.")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Held-out accuracy of a model on the job's evaluation data, greedy and sampled, with 95% intervals."""
    from sapo_ray.config.load import load_job

    overrides = list(set_ or [])
    if model is not None:
        overrides += [f"model.path={model}", "model.warm_start_accuracy=null"]
    with _user_errors(), tempfile.TemporaryDirectory(prefix="sapo-eval-") as folder:
        spec = load_job(job, overrides)
        from sapo_ray.driver.evaluate_run import evaluate_model

        result = evaluate_model(spec, Path(folder))
        if as_json:
            print(json.dumps(result, indent=1))
            return
        from sapo_ray.progress import accuracy_rows, interval

        for label, _, accuracy in accuracy_rows(None, result):
            print(f"{label:<24} {interval(accuracy)}  ({accuracy['prompts']} prompts, {accuracy['errors']} errors)")


@app.command()
def gates(
    tau: Annotated[float, typer.Option(min=1e-6, help="Gate temperature, > 0.")] = 1.0,
    match_width: Annotated[bool, typer.Option(help="Give every gate the sigmoid's half-width at this tau.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG, SVG or PDF file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tabulate the smooth gates: where their weight is 1/2, the largest r w(r), their bounds; --plot draws them."""
    from dataclasses import asdict, fields

    from sapo_ray.algorithms.gate_report import GateRow, gate_rows, plot_gates

    rows = [asdict(row) for row in gate_rows(tau, match_width=match_width)]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        from rich.table import Table

        table = Table(*(field.name.replace("_", " ") for field in fields(GateRow)))
        for row in rows:
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)
    if plot is not None:
        plot_gates(plot, tau, match_width=match_width)
        console.print(f"plot written to {plot}", highlight=False)


@app.command()
def grade(
    completions: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Rows with `completion` and `gold`.")],
    graded: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The rows with verdict, reason and seconds.")],
    processes: Annotated[int, typer.Option(min=1, help="Grading processes.")] = 2,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds per answer.")] = 5.0,
    answer: Annotated[Literal["auto", "boxed", "gsm8k", "tag"], typer.Option(help="Where the answer stands.")] = "auto",
    reward: Annotated[str | None, typer.Option(help="Your own module:function.")] = None,
) -> None:
    """Grade completions with the verifier, offline. Poison answers end as `error`; they never stop the rest."""
    with _user_errors():
        from sapo_ray.config.spec import VerifierSpec
        from sapo_ray.verifier.offline import grade_file

        spec = VerifierSpec(processes=processes, deadline_s=deadline, answer=answer, reward=reward)
        summary = grade_file(completions, graded, spec)
        print(summary)


def main() -> None:
    """Entry point of the `sapo-ray` command."""
    # Libraries' own progress bars would run through ours; set before any of them is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
