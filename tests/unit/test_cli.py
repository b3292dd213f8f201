"""What commands print, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from sapo_ray.cli import app
from sapo_ray.driver import run
from sapo_ray.errors import TrainingFailed

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, list(arguments))


def train_that(ends: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    """`train` of a run that starts in `a run` and then ends as told."""

    def train(spec: Any, listener: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        listener({"kind": "transition", "state": "starting", "run_dir": str(tmp_path / "a run")})
        ends()
        return {}

    monkeypatch.setattr(run, "train", train)
    return invoke("train", QUICKSTART, *options)


def raises(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize(
    ("end", "code"),
    [
        (raises(KeyboardInterrupt()), 130),
        (raises(asyncio.CancelledError()), 143),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
        (raises(TrainingFailed("no room")), 1),
    ],
)
def test_who_ends_a_run_is_told_how_to_go_on(
    end: Callable[[], None], code: int, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a run" / "checkpoints" / "latest").write_text("step-000020")
    result = train_that(end, tmp_path, monkeypatch, *options)
    assert result.exit_code == code
    assert f"go on with: sapo-ray resume '{tmp_path}/a run'\n" in result.stderr
    assert f"{tmp_path}/a run/logs" in result.stderr
    assert "no checkpoint yet" not in result.stderr


def test_a_run_that_ends_before_its_first_checkpoint_is_said_to_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train_that(raises(KeyboardInterrupt()), tmp_path, monkeypatch)
    assert "no checkpoint yet: it starts over" in result.stderr


def test_valid_is_the_last_word_and_says_what_was_not_opened() -> None:
    lines = invoke("validate", QUICKSTART).stdout.splitlines()
    assert lines[-2].strip() == "model and data were not opened; add --inputs"
    assert lines[-1] == f"valid: {QUICKSTART}"


def test_a_job_whose_data_is_missing_is_not_called_valid(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("preset: quickstart\ndata:\n  train:\n    - path: absent.jsonl\n")
    result = invoke("validate", str(job), "--inputs")
    assert result.exit_code == 1
    assert "valid:" not in result.stdout


def test_opened_inputs_are_counted_before_the_last_word(tmp_path: Path) -> None:
    rows = [{"question": "1+1=", "answer": answer} for answer in ("2", "#### \\frac{1}{", "2")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.train=[{{path: {tmp_path / 'data.jsonl'}}}]", "data.unusable_gold=skip"]
    settings.append("model.warm_start_accuracy=null")
    result = invoke("validate", QUICKSTART, "--inputs", *(a for s in settings for a in ("--set", s)))
    lines = result.stdout.splitlines()
    assert lines[-3] == "  inputs: 2 prompts, 0 skipped as too long, 1 for their reference answers; 512 for evaluation"
    assert lines[-1] == f"valid: {QUICKSTART}"


def test_validate_gives_job_estimate_and_notes_as_json() -> None:
    report = json.loads(invoke("validate", QUICKSTART, "--json", "--set", "learner.mini_batches=1").stdout)
    assert report["job"]["rollout"]["group_size"] == 16
    assert report["estimate"]["parameters"] == 138112
    assert "one update per step" in report["notes"][0]
    assert set(report) == {"job", "estimate", "notes"}


def test_the_job_that_validate_shows_can_be_validated_again(tmp_path: Path) -> None:
    shown = invoke("validate", QUICKSTART, "--show", "--set", "seed=7").stdout
    assert yaml.safe_load(shown)["learner"]["betas"] == [0.9, 0.99]
    job = tmp_path / "shown.yaml"
    job.write_text(shown)
    assert invoke("validate", str(job), "--show").stdout == shown


def test_the_gates_fit_80_columns_uncut() -> None:
    result = invoke("gates", "--tau", "1")
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["sigmoid", "1", "-", "2.763", "1.575", "2.06", "0.07577", "3", "exp(-|u|)"] in rows
    # At r = 2 the arctan's weight is 1 / (1 + 1) and its coefficient 2 / 2; clip has cut off at 1.25.
    at = {gate: index for index, row in enumerate(rows) for gate in ("arctan", "clip") if row[:2] == [gate, "f"]}
    assert (rows[at["arctan"] + 1][8], rows[at["arctan"] + 2][9]) == ("0.500", "1.000")
    assert rows[at["clip"]][7] == "1.200"


def test_gates_of_a_negative_advantage_restore_from_above() -> None:
    report = json.loads(invoke("gates", "--tau", "10", "--negative", "--restoring", "--json").stdout)
    erf = next(row for row in report["curves"] if row["gate"] == "erf")
    assert erf["weight"][erf["ratio"].index(2.0)] == 1.0
    clip = next(row for row in report["curves"] if row["gate"] == "clip")
    assert clip["value"][clip["ratio"].index(0.5)] == pytest.approx(0.8)


@pytest.mark.parametrize(("name", "said"), [("g.bmp", "must end in .png, .svg, .pdf"), ("no/g.png", "no folder")])
def test_a_plot_that_cannot_be_written_is_a_message(tmp_path: Path, name: str, said: str) -> None:
    result = invoke("gates", "--plot", str(tmp_path / name))
    assert result.exit_code == 1
    assert said in result.stderr


def test_json_of_the_gates_is_json_beside_a_plot(tmp_path: Path) -> None:
    result = invoke("gates", "--json", "--plot", str(tmp_path / "g.svg"))
    assert len(json.loads(result.stdout)["gates"]) == 4
    assert "plot written to" in result.stderr


def test_grading_counts_in_one_line_and_as_json(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    completions = ["\\boxed{4}", "<think>2+2</think> <answer>4</answer>", "5", "\\boxed{123456789012}", "\\boxed{5}"]
    rows = [json.dumps({"completion": c, "gold": "4"}) + "\n" for c in completions]
    source.write_text("".join([*rows, json.dumps({"completion": "\\boxed{9^{9^{9^9}}}", "gold": "4"})]))
    options = ("--max-answer-chars", "11", "--format-reward", "think_answer", "--memory-mb", "1500", "--deadline", "1")
    result = invoke("grade", str(source), str(target), *options)
    assert result.stdout == f"6 rows: 2 correct, 2 wrong, 2 errors -> {target}\n"
    assert [json.loads(line)["reason"] for line in target.read_text().splitlines()][3:] == [
        "too_long",
        "mismatch",
        "timeout",
    ]
    assert json.loads(target.read_text().splitlines()[1])["reward"] == 2.0
    source.write_text("".join(rows))
    counts = json.loads(invoke("grade", str(source), str(target), "--json").stdout)
    assert counts == {"rows": 5, "correct": 2, "wrong": 3, "errors": 0}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_evaluation_tells_of_its_progress_beside_its_result(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapo_ray.driver import evaluate_run

    accuracy = {"mean": 0.5, "low": 0.4, "high": 0.6, "prompts": 2, "completions": 2, "errors": 0}

    def evaluate_model(spec: Any, folder: Path, listener: Any = None) -> dict[str, Any]:
        if listener is not None:
            listener({"kind": "phase", "phase": "evaluating", "prompts": 2})
            listener({"kind": "evaluating", "completions": "greedy", "done": 2, "prompts": 2})
        return {"greedy": accuracy, "sampled": None, "by_source": {}}

    monkeypatch.setattr(evaluate_run, "evaluate_model", evaluate_model)
    result = invoke("eval", QUICKSTART, *options)
    if options:
        assert json.loads(result.stdout)["greedy"] == accuracy
        assert result.stderr == ""
    else:
        assert result.stdout == f"{'greedy':<24} 0.500 [0.400, 0.600]  (2 prompts, 0 errors)\n"
        assert "greedy  2/2" in result.stderr
