"""What a user can get wrong, through the command line: a message that names it, exit code 1, nothing started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sapo_ray.cli import app

ROOT = Path(__file__).parents[2]
GOOD = {"question": "What is 2 + 3?", "answer": "2+3=5\n#### 5"}


def train(*settings: str) -> str:
    """Start the GSM8K smoke job with `settings`; return the message it is refused with."""
    arguments = ["train", str(ROOT / "configs" / "gsm8k-smoke.yaml"), "--set", "evaluation.data=[]"]
    arguments += ["--set", "data.train.0.config=null", *(a for s in settings for a in ("--set", s))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return path


def at(tmp_path: Path, data: Path) -> tuple[str, str]:
    return f"run_dir={tmp_path / 'run'}", f"data.train.0.path={data}"


def test_an_unknown_key_comes_with_the_one_that_was_meant(tmp_path: Path, data: Path) -> None:
    message = train(*at(tmp_path, data), "rollout.worker=3")
    assert "rollout.worker" in message
    assert "did you mean" in message.lower()
    assert "rollout.workers" in message


def test_a_value_out_of_range_names_field_value_and_bound(tmp_path: Path, data: Path) -> None:
    message = train(*at(tmp_path, data), "rollout.group_size=1")
    assert "rollout.group_size" in message
    assert ">= 2" in message
    assert "got 1" in message


def test_a_missing_model_is_named_with_the_ways_out(tmp_path: Path, data: Path) -> None:
    message = train(*at(tmp_path, data), "model.path=./no/such/model")
    assert "./no/such/model" in message
    assert "builtin:bytes" in message


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    message = train(*at(tmp_path, tmp_path / "absent.jsonl"))
    assert "absent.jsonl" in message


def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, data: Path) -> None:
    with data.open("a") as file:
        file.write('{"question": "x", \n')
    assert "data.jsonl:2" in train(*at(tmp_path, data))


def test_a_prompt_over_the_limit_is_named_with_its_length(tmp_path: Path, data: Path) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"question": "y" * 900, "answer": "#### 1"}) + "\n")
    message = train(*at(tmp_path, data), "data.overlong=error")
    assert "data.jsonl:2" in message
    assert "512" in message
    assert "data.overlong: skip" in message or "overlong" in message


def test_a_reference_answer_that_does_not_parse_is_found_before_anything_starts(tmp_path: Path, data: Path) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"question": "y", "answer": "#### \\frac{1}{"}) + "\n")
    message = train(*at(tmp_path, data), "data.train.0.gold=as_is", "verifier.answer=boxed")
    assert "of 2 reference answers" in message
    assert "data.jsonl:2" in message


def test_too_little_disk_is_found_at_the_start(tmp_path: Path, data: Path) -> None:
    message = train(*at(tmp_path, data), "checkpoint.min_free_gb=1e9")
    assert "too little disk for a checkpoint" in message
    assert "checkpoint.min_free_gb" in message


def test_a_failed_start_can_be_mended_and_sent_again_under_the_same_name(tmp_path: Path, data: Path) -> None:
    train(*at(tmp_path, tmp_path / "absent.jsonl"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "absent.jsonl" in result["reason"]
    assert "absent2.jsonl" in train(*at(tmp_path, tmp_path / "absent2.jsonl"))


def test_resuming_what_is_no_run_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["resume", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not a run directory" in result.output


def test_grading_names_the_line_that_lacks_a_field(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"completion": "\\\\boxed{4}", "gold": "4"}\n{"completion": "5"}\n')
    result = CliRunner().invoke(app, ["grade", str(source), str(tmp_path / "out.jsonl")])
    assert result.exit_code == 1
    assert "in.jsonl:2" in result.output
    assert "gold" in result.output
    assert not (tmp_path / "out.jsonl").exists()


def refused(*arguments: str) -> str:
    """The one line that a command is refused with."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    heading, message, *rest = result.output.strip().splitlines()
    assert (heading, rest) == ("error: ConfigError", [])
    return message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--reward", "bad"), ("verifier.reward must be `module:function`, got 'bad'", "write")),
        (("--deadline", "inf"), ("--deadline: ", "finite number", "got inf")),
    ],
)
def test_a_setting_of_grading_that_cannot_be_is_one_line(
    tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"completion": "5", "gold": "5"}\n')
    message = refused("grade", str(source), str(tmp_path / "out.jsonl"), *options)
    assert [word for word in words if word not in message] == []


def test_grading_into_a_folder_is_refused_before_anything_is_graded(tmp_path: Path) -> None:
    assert "is a folder; name the file" in refused("grade", str(tmp_path / "absent.jsonl"), str(tmp_path))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/run"])
def test_a_run_dir_that_cannot_be_a_folder_is_named_with_the_way_out(tmp_path: Path, data: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    message = train(f"run_dir={tmp_path / place}", f"data.train.0.path={data}")
    assert f"run_dir {tmp_path / place} cannot be made" in message.replace("\n", "")
    assert "name a folder" in message


def test_a_secret_that_is_not_in_the_environment_is_named_with_the_way_out(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOD_TOKEN", "x")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    monkeypatch.delenv("LOST_TOKEN", raising=False)
    message = train(*at(tmp_path, data), "secrets=[GOOD_TOKEN,LOST_TOKEN,EMPTY_TOKEN]")
    assert "secrets: LOST_TOKEN, EMPTY_TOKEN must be set in the environment" in message
    assert "export LOST_TOKEN=..." in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["[" * 3000, "a: " + "{b: " * 3000 + "1" + "}" * 3000])
def test_yaml_nested_without_end_is_one_line(tmp_path: Path, text: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    assert f"{job}: nested too deeply to be read" in refused("validate", str(job))


@pytest.mark.parametrize("tau", ["inf", "1e300"])
def test_gates_without_a_finite_temperature_are_refused(tau: str) -> None:
    assert f"--tau must be > 0 and <= 1e+06, got {float(tau)}" in refused("gates", "--tau", tau)
