"""Commands for one job without a service, and for looking at a job before it runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sapo_ray.cli.jobs import resume_job
from sapo_ray.cli.options import JOB_ID, AsJson, JobFile, Overrides, Wait, console
from sapo_ray.ending import Heard, user_errors
from sapo_ray.terminal import shown

if TYPE_CHECKING:
    from sapo_ray.config.estimate import Estimate
    from sapo_ray.config.spec import JobSpec


def train(job: JobFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Train a model by the job in JOB.yaml, on this machine or on the Ray cluster that RAY_ADDRESS names."""
    from sapo_ray.config.load import load_job

    with user_errors() as heard:
        spec = load_job(job, set_ or [])
        from sapo_ray.driver import run

        _show(lambda listener: run.train(spec, listener), heard, as_json)


def resume(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run directory of an earlier `train`, or the id of a paused job.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run, e.g. --set steps=120. Repeatable."),
    ] = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its newest checkpoint, or with a paused job of a service.

    A run without a checkpoint starts over. --set, for runs only, may change steps, rollout.workers, secrets, and all of
    checkpoint, evaluation, logging, deadlines and output. --wait is for jobs: show the progress until the job ends.
    """
    if JOB_ID.fullmatch(run):
        if set_:
            raise typer.BadParameter("a job of a service goes on as it is; submit a new one", param_hint="--set")
        resume_job(run, wait, as_json)
        return
    with user_errors() as heard:
        from sapo_ray.driver import run as runs

        _show(lambda listener: runs.resume(Path(run), set_ or [], listener), heard, as_json)


def _show(start: Callable[[Callable[[dict[str, Any]], None]], dict[str, Any]], heard: Heard, as_json: bool) -> None:
    """Run with a progress display, or silently for JSON."""
    if as_json:
        print(json.dumps(start(heard.listener(None)), indent=1))
        return
    from sapo_ray.progress import ProgressDisplay, print_result

    with ProgressDisplay(console) as display:
        result = start(heard.listener(display))
    print_result(console, result)


def validate(
    job: JobFile,
    set_: Overrides = None,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Also load model, tokenizer and data, and check every gold answer.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved job, every key of it, as YAML.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a job and estimate what it needs, without starting anything."""
    from sapo_ray.config.load import load_job

    with user_errors():
        spec = load_job(job, set_ or [])
        from sapo_ray.algorithms.settings import advice

        found = _open_inputs(spec) if inputs else None
        if as_json:
            needs = _estimate(spec)
            report = {"job": spec.model_dump(mode="json"), "estimate": needs and asdict(needs), "notes": advice(spec)}
            print(json.dumps(report | ({"inputs": found} if found else {}), indent=1))
            return
        if show:
            import yaml

            print(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
            return
        _print_estimate(spec)
        for warning in advice(spec):
            console.print(f"[yellow]note:[/] {shown(warning)}", highlight=False)
        if found:
            counts = "{prompts} prompts, {skipped} skipped as too long, {skipped_golds} for their reference answers"
            print(f"  inputs: {counts.format(**found)}; {found['evaluation']} for evaluation")
            print("  the model and every reference answer in use were found good")
        else:
            print("  model and data were not opened; add --inputs")
        console.print(f"[green]valid[/]: {shown(str(job))}", highlight=False, soft_wrap=True)


def _open_inputs(spec: JobSpec) -> dict[str, int]:
    """Numbers of prompts, once model, tokenizer, data and every reference answer were found good."""
    from sapo_ray.driver.inputs import prepare_inputs

    with tempfile.TemporaryDirectory(prefix="sapo-validate-") as folder:
        found = prepare_inputs(spec, Path(folder) / "model")
    return {
        "prompts": len(found.prompts),
        "skipped": found.prompts.skipped,
        "skipped_golds": found.prompts.skipped_golds,
        "evaluation": len(found.evaluation),
    }


def _estimate(spec: JobSpec) -> Estimate | None:
    """None where the sizes of the model are not known without network."""
    from sapo_ray.config.architecture import find_architecture
    from sapo_ray.config.estimate import estimate

    architecture = find_architecture(spec.model)
    return None if architecture is None else estimate(spec, architecture)


def _print_estimate(spec: JobSpec) -> None:
    needs = _estimate(spec)
    if needs is None:
        print(f"  no estimate: the sizes of {spec.model.path} are not known without network; try a local folder")
        return
    for label, value in needs.table():
        print(f"  {label:<28} {value}")
    for assumption in needs.assumptions:
        print(f"  assumed: {assumption}")


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
    with user_errors() as heard, tempfile.TemporaryDirectory(prefix="sapo-eval-") as folder:
        spec = load_job(job, overrides)
        from sapo_ray.driver.evaluate_run import evaluate_model

        if as_json:
            print(json.dumps(evaluate_model(spec, Path(folder), heard.listener(None)), indent=1))
            return
        from sapo_ray.progress import ProgressDisplay, accuracy_rows, interval

        with ProgressDisplay(Console(stderr=True)) as display:
            result = evaluate_model(spec, Path(folder), heard.listener(display))

        for label, _, accuracy in accuracy_rows(None, result):
            counts = f"{accuracy['prompts']} prompts, {accuracy['errors']} errors"
            if own_doing := accuracy.get("unverifiable"):
                counts += f", {own_doing} counted as wrong that could not be graded"
            print(f"{label:<24} {interval(accuracy)}  ({counts})")
