"""Commands that look at parts: the gates, and the grading of completions."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from sapo_ray.cli.options import AsJson, console
from sapo_ray.ending import user_errors
from sapo_ray.errors import ConfigError

MAX_TAU = 1e6
"""A gate with a larger tau is a step; its numbers overflow in the end."""


@contextmanager
def _as_options(**names: str) -> Iterator[None]:
    """What is wrong with a setting, in the words of the command line; `names` are options named otherwise."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        problems = []
        for one in error.errors():
            text = one["msg"].removeprefix("Value error, ")
            if one["loc"]:
                key = str(one["loc"][0])
                text = (
                    f"{names.get(key, '--' + key.replace('_', '-'))}: {text[:1].lower()}{text[1:]}, got {one['input']}"
                )
            problems.append(text)
        raise ConfigError("; ".join(problems)) from error


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
        if not 0 < tau <= MAX_TAU:
            raise ConfigError(f"--tau must be > 0 and <= {MAX_TAU:g}, got {tau}; training uses about 0.5 to 10")
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

        if find_spec("math_verify") is None:  # grading processes need it, and know no better remedy than more memory
            raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify")
        with _as_options(deadline_s="--deadline"):
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
