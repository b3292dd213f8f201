"""What is found out about a job's inputs before any engine starts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sapo_ray.config.spec import JobSpec
from sapo_ray.data.prompts import PromptSource, evaluation_prompts
from sapo_ray.driver.inputs import check_positions, check_references, prepare_evaluation
from sapo_ray.errors import ConfigError, DataError
from sapo_ray.models.builtin import make_addition_model
from sapo_ray.models.tokenizer import load_tokenizer


def job(**sections: Any) -> JobSpec:
    data = {"train": [{"path": "builtin:addition"}], "template": "plain", "max_prompt_tokens": 16}
    sections["data"] = {**data, **sections.get("data", {})}
    sections["model"] = {"path": "builtin:addition", "dtype": "float32", **sections.get("model", {})}
    return JobSpec.model_validate({"steps": 1, **sections})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("no_such_module_here:score", "cannot import module 'no_such_module_here'"),
        ("my_reward:absent", "module 'my_reward' has no function 'absent'"),
        ("my_reward:takes_nothing", "must take completion=, gold= and prompt="),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_refused(
    reward: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_reward.py").write_text("def takes_nothing(): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_references(job(verifier={"reward": reward}))


def test_a_reward_function_that_can_be_called_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fine_reward.py").write_text("def score(*, completion, gold, prompt): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_references(job(verifier={"reward": "fine_reward:score"}))


@pytest.mark.parametrize("reward", ["score", "rewards/math.py:score", "rewards:", ":score", "a:b:c"])
def test_a_reward_that_does_not_name_a_function_is_refused_with_the_form(reward: str) -> None:
    with pytest.raises(ValueError, match=r"verifier.reward must be `module:function`"):
        job(verifier={"reward": reward})


def test_a_prompt_and_completion_longer_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 1024}')
    data, learner = {"max_prompt_tokens": 512}, {"tokens_per_micro_batch": 4096}
    check_positions(job(data=data, learner=learner, rollout={"max_new_tokens": 512}), tmp_path)
    with pytest.raises(
        ConfigError, match=r"data.max_prompt_tokens \+ rollout.max_new_tokens must be <= 1024.*512 \+ 513 = 1025"
    ):
        check_positions(job(data=data, learner=learner, rollout={"max_new_tokens": 513}), tmp_path)
    with pytest.raises(ConfigError, match=r"evaluation.max_new_tokens must be <= 1024.*512 \+ 600 = 1112"):
        check_positions(
            job(data=data, learner=learner, evaluation={"max_new_tokens": 600}, rollout={"max_new_tokens": 8}), tmp_path
        )


@pytest.fixture
def one_bad_gold(tmp_path: Path) -> str:
    path = tmp_path / "sums.jsonl"
    rows = [("2+3=", "5"), ("4+4=", "\\frac{1}{"), ("3+4=", "7")]
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return str(path)


def test_a_reference_that_does_not_parse_is_an_error_that_names_the_way_out(one_bad_gold: str) -> None:
    with pytest.raises(DataError, match=r"1 of 3 reference answers.*sums.jsonl:2.*data.unusable_gold: skip"):
        check_references(job(data={"train": [{"path": one_bad_gold}]}))


def test_rows_whose_reference_does_not_parse_are_skipped_and_counted_where_asked(
    one_bad_gold: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"path": one_bad_gold}
    spec = job(data={"train": [source], "unusable_gold": "skip", "shuffle": False}, evaluation={"data": [source]})
    with caplog.at_level(logging.WARNING):
        found = check_references(spec)
    assert (found.train, found.evaluation) == ([frozenset([1])], [frozenset([1])])
    assert "sums.jsonl:2" in caplog.text
    make_addition_model(tmp_path / "model", 0)
    tokenizer = load_tokenizer(tmp_path / "model")
    prompts = PromptSource(spec.data, tokenizer, 0, found.train)
    assert (len(prompts), prompts.skipped_golds, prompts.skipped) == (2, 1, 0)
    assert [prompts.take().gold for _ in range(4)] == ["5", "7", "5", "7"]
    assert prompts.fingerprint != PromptSource(spec.data, tokenizer, 0).fingerprint
    evaluation = evaluation_prompts(spec.evaluation.data, spec.data, tokenizer, 2, found.evaluation)
    assert [prompt.gold for prompt in evaluation] == ["5"]
    with pytest.raises(DataError, match="none of 3 rows is left: 3 reference answers cannot be parsed"):
        PromptSource(spec.data, tokenizer, 0, [frozenset([0, 1, 2])])


def test_an_evaluation_does_not_open_the_training_data(tmp_path: Path) -> None:
    held_out = {"path": "builtin:addition", "split": "heldout"}
    data, evaluation = {"train": [{"path": "absent.jsonl"}]}, {"data": [held_out], "limit": 6}
    spec = job(data=data, evaluation=evaluation, rollout={"max_new_tokens": 28})
    found = prepare_evaluation(spec, tmp_path / "model")
    assert [prompt.id for prompt in found.evaluation] == [f"eval/addition-heldout:{row}:0" for row in range(6)]
    assert found.canary == tuple(prompt.token_ids for prompt in found.evaluation[:4])


def test_an_evaluation_refuses_what_it_cannot_grade_against(one_bad_gold: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 3 reference answers.*sums.jsonl:2"):
        prepare_evaluation(job(evaluation={"data": [{"path": one_bad_gold}]}), tmp_path / "model")
