"""What is found out about a job's inputs before any engine starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.inputs import check_positions, check_references
from sapo_ray.errors import ConfigError


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
