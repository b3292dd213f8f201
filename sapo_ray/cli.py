"""Command line of sapo-ray. Commands import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from sapo_ray import __version__
from sapo_ray.ending import Heard, user_errors

if TYPE_CHECKING:
    from sapo_ray.config.estimate import Estimate
    from sapo_ray.config.spec import JobSpec

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models by reinforcement learning; never lose a sample.\n\n"
    "Start with: sapo-ray train configs/quickstart.yaml",
    epilog="Exit codes: 0 done; 1 something you can mend, the message says what; 2 wrong usage; 130 Ctrl-C; "
    "143 SIGTERM. After 130 and 143 a run goes on by `sapo-ray resume RUN`.",
)
console = Console()

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the job, e.g. --set seed=1. Repeatable."),
]
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job: see docs/jobs.md and configs/.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(job: JobFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Train a model by the job in JOB.yaml, on this machine or on the Ray cluster that RAY_ADDRESS names."""
    from sapo_ray.config.load import load_job

    with user_errors() as heard:
        spec = load_job(job, set_ or [])
        from sapo_ray.driver import run

        _show(lambda listener: run.train(spec, listener), heard, as_json)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of an earlier `train`.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job, e.g. --set steps=120. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its newest checkpoint; a run without one starts over.

    --set may change steps, rollout.workers, and all of checkpoint, evaluation, logging and deadlines.
    """
    with user_errors() as heard:
        from sapo_ray.driver import run

        _show(lambda listener: run.resume(run_dir, set_ or [], listener), heard, as_json)


def _show(start: Callable[[Callable[[dict[str, Any]], None]], dict[str, Any]], heard: Heard, as_json: bool) -> None:
    """Run with a progress display, or silently for JSON."""
    if as_json:
        print(json.dumps(start(heard.listener(None)), indent=1))
        return
    from sapo_ray.progress import ProgressDisplay, print_result

    with ProgressDisplay(console) as display:
        result = start(heard.listener(display))
    print_result(console, result)


@app.command()
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
            console.print(f"[yellow]note:[/] {escape(warning)}", highlight=False)
        if found:
            counts = "{prompts} prompts, {skipped} skipped as too long, {skipped_golds} for their reference answers"
            print(f"  inputs: {counts.format(**found)}; {found['evaluation']} for evaluation")
            print("  the model and every reference answer in use were found good")
        else:
            print("  model and data were not opened; add --inputs")
        console.print(f"[green]valid[/]: {escape(str(job))}", highlight=False, soft_wrap=True)


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
    with user_errors(), tempfile.TemporaryDirectory(prefix="sapo-eval-") as folder:
        spec = load_job(job, overrides)
        from sapo_ray.driver.evaluate_run import evaluate_model

        if as_json:
            print(json.dumps(evaluate_model(spec, Path(folder)), indent=1))
            return
        from sapo_ray.progress import ProgressDisplay, accuracy_rows, interval

        with ProgressDisplay(Console(stderr=True)) as display:
            result = evaluate_model(spec, Path(folder), display)

        for label, _, accuracy in accuracy_rows(None, result):
            print(f"{label:<24} {interval(accuracy)}  ({accuracy['prompts']} prompts, {accuracy['errors']} errors)")


@app.command()
def gates(
    tau: Annotated[float, typer.Option(min=1e-6, help="Gate temperature, > 0.")] = 1.0,
    match_width: Annotated[bool, typer.Option(help="Give every gate the sigmoid's half-width at this tau.")] = False,
    negative: Annotated[
        bool, typer.Option("--negative", help="Second table for tokens of negative advantage (tau is then tau_neg).")
    ] = False,
    restoring: Annotated[
        bool, typer.Option("--restoring", help="Second table for the restoring variant (docs/algorithm.md).")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG, SVG or PDF file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tabulate the gates: where their weight is 1/2, the largest r w(r), their bounds; f, w and r w at some ratios."""
    with user_errors():
        from sapo_ray.algorithms.gate_report import curve_rows, curve_table, gate_rows, gate_table, plot_gates

        if plot is not None:
            plot_gates(plot, tau, match_width=match_width)
        rows = gate_rows(tau, match_width=match_width)
        curves = curve_rows(tau, match_width=match_width, positive=not negative, restoring=restoring)
        if as_json:
            print(json.dumps({"gates": [asdict(r) for r in rows], "curves": [asdict(r) for r in curves]}, indent=1))
        else:
            console.print(gate_table(rows))
            sign = "A < 0" if negative else "A > 0"
            console.print(f"f(r), w(r) and r w(r), {sign}{', restoring' if restoring else ''}; clip at 0.2")
            console.print(curve_table(curves))
        if plot is not None:
            print(f"plot written to {plot}", file=sys.stderr if as_json else sys.stdout)


@app.command()
def grade(
    completions: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help="Rows with `completion`, `gold` and perhaps `prompt`, all text.")
    ],
    graded: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="The rows with verdict, reward, reason, seconds and parts.")
    ],
    processes: Annotated[int, typer.Option(min=1, help="Grading processes, side by side.")] = 2,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds per answer; then its verdict is `error`.")] = 5.0,
    answer: Annotated[
        Literal["auto", "boxed", "gsm8k", "tag"],
        typer.Option(help="Where the answer stands: last \\boxed{}, after ####, in <answer>; auto: whichever is last."),
    ] = "auto",
    reward: Annotated[
        str | None, typer.Option(help="Your own module:function in place of answer checking (docs/guides/reward.md).")
    ] = None,
    format_reward: Annotated[
        Literal["none", "think_answer"], typer.Option(help="Add 0, .25, .5 or 1 for the form of the completion.")
    ] = "none",
    memory_mb: Annotated[int, typer.Option(min=1, help="Address space of one grading process.")] = 2048,
    max_answer_chars: Annotated[int, typer.Option(min=1, help="Longer answers are not parsed: `error`.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Grade completions with the verifier, offline. Poison answers end as `error`; they never stop the rest."""
    with user_errors():
        from sapo_ray.config.spec import VerifierSpec
        from sapo_ray.verifier.offline import grade_file

        spec = VerifierSpec(
            processes=processes,
            deadline_s=deadline,
            answer=answer,
            reward=reward,
            format_reward=format_reward,
            memory_mb=memory_mb,
            max_answer_chars=max_answer_chars,
        )
        terminal = Console(stderr=True)
        with terminal.status("grading") if terminal.is_terminal else nullcontext() as status:
            report = (lambda rows: status.update(f"grading: {rows} rows done")) if status else None
            summary = grade_file(completions, graded, spec, report)
        if as_json:
            print(json.dumps(asdict(summary), indent=1))
        else:
            counts = f"{summary.correct} correct, {summary.wrong} wrong, {summary.errors} errors"
            print(f"{summary.rows} rows: {counts} -> {graded}")


def main() -> None:
    """Entry point of the `sapo-ray` command."""
    # Libraries' own progress bars would run through ours; set before any of them is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
