"""Grading a file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import ConfigError, DataError
from sapo_ray.verifier.offline import ROWS_AHEAD, grade_file


def test_rows_come_back_in_order_with_their_verdicts(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "completion": r"\boxed{1/2}", "gold": "0.5"},
        {"id": 2, "completion": r"\boxed{9^{9^{9^9}}}", "gold": "0.5"},
        {"id": 3, "completion": "half \ud800", "gold": "0.5", "prompt": "?"},
        {"id": 4, "completion": "#### 1,080", "gold": "1080", "verdict": "stale", "extra": [1]},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows))
    done: list[int] = []
    summary = grade_file(source, target, VerifierSpec(deadline_s=1), done.append)
    graded = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["id"], row["verdict"], row["reward"], row["reason"]) for row in graded] == [
        (1, "correct", 1.0, "match"),
        (2, "error", None, "timeout"),
        (3, "wrong", 0.0, "no_answer"),
        (4, "correct", 1.0, "match"),
    ]
    assert graded[1]["seconds"] >= 1
    assert graded[2]["completion"] == "half \ud800"
    assert graded[3]["extra"] == [1]
    assert (summary.rows, summary.correct, summary.wrong, summary.errors) == (4, 2, 1, 1)
    assert done == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_file_longer_than_what_is_held_in_memory_keeps_its_order(tmp_path: Path) -> None:
    draw = random.Random(0)
    answers = [(draw.randrange(50), draw.randrange(50)) for _ in range(3 * ROWS_AHEAD + 7)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"completion": f"#### {a}", "gold": str(b)}) + "\n" for a, b in answers))
    grade_file(source, target, VerifierSpec())
    rewards = [json.loads(line)["reward"] for line in target.read_text().splitlines()]
    assert rewards == [float(a == b) for a, b in answers]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"in\.jsonl:2: not JSON"),
        ("[1]", r"in\.jsonl:2: must be a JSON object, got list"),
        ('{"completion": "x"}', r":2: no field `gold`; a row needs `completion` and `gold`, got \['completion'\]"),
        ('{"gold": "x"}', r":2: no field `completion`"),
        ('{"completion": "x", "gold": true}', r":2: `gold` must be text or a number, got bool"),
        ('{"completion": 5, "gold": "5"}', r":2: `completion` must be text, got int"),
        ('{"completion": "x", "gold": "5", "prompt": null}', r":2: `prompt` must be text, got NoneType"),
        ("\udcff", r":2: not JSON"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_written(tmp_path: Path, line: str, message: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    target.write_text("what stood there")
    good = json.dumps({"completion": "#### 5", "gold": "5"})
    source.write_bytes(f"{good}\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        grade_file(source, target, VerifierSpec())
    assert target.read_text() == "what stood there"
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read \(No such file"):
        grade_file(tmp_path / "absent.jsonl", tmp_path / "out.jsonl", VerifierSpec())
    source = tmp_path / "in.jsonl"
    source.write_text("")
    with pytest.raises(DataError, match=r"out\.jsonl: cannot be written \(No such file"):
        grade_file(source, tmp_path / "no" / "out.jsonl", VerifierSpec())


def test_a_reward_function_that_does_not_exist_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"completion": "#### 5", "gold": "5"}))
    with pytest.raises(ConfigError, match="no_such_module_here"):
        grade_file(source, tmp_path / "out.jsonl", VerifierSpec(reward="no_such_module_here:f"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_reference_that_is_a_json_number_is_graded_against_and_stays_one(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"completion": r"\boxed{5}", "gold": 5}, {"completion": r"\boxed{1/4}", "gold": 0.25}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grade_file(source, target, VerifierSpec())
    graded = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["gold"], row["verdict"]) for row in graded] == [(5, "correct"), (0.25, "correct")]
