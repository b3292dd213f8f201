"""How a job's settings become an engine's."""

from __future__ import annotations

from typing import Any

import pytest

from sapo_ray.config.spec import JobSpec
from sapo_ray.models.builtin import make_addition_model
from sapo_ray.rollout.engine import (
    actor_environment,
    engine_arguments,
    expected_parameters,
    longest_sequence,
)
from sapo_ray.rollout.remote import ray_remote_args


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_addition_model(folder, 0)
    return str(folder)


def job(prompt: int = 16, **sections: Any) -> JobSpec:
    fixed = {"steps": 1, "model": {"path": "m"}, "data": {"train": [{"path": "d"}], "max_prompt_tokens": prompt}}
    return JobSpec.model_validate(fixed | sections)


def test_what_is_sampled_from_is_the_policy_and_nothing_of_the_models_own_taste(model: str) -> None:
    arguments = engine_arguments(job(), model)
    assert arguments["generation_config"] == "vllm"
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["dtype"] == "bfloat16"
    assert engine_arguments(job(model={"path": "m", "dtype": "float32"}), model)["dtype"] == "float32"


def test_the_longest_sequence_is_what_the_job_can_ask_for_and_the_model_can_take(model: str) -> None:
    assert longest_sequence(job(16, rollout={"max_new_tokens": 28}), model) == 44
    assert longest_sequence(job(16, rollout={"max_new_tokens": 28}, evaluation={"max_new_tokens": 100}), model) == 116
    assert longest_sequence(job(1000, rollout={"max_new_tokens": 28}), model) == 1024  # positions of the model


def test_the_expected_weights_are_those_of_the_models_definition(model: str) -> None:
    expected = expected_parameters(job(), model)
    assert sum(rows * (columns[0] if columns else 1) for rows, *columns in expected.values()) == 138_112
    assert expected["model.embed_tokens.weight"] == (99, 64)
    assert "lm_head.weight" not in expected  # tied


@pytest.mark.parametrize(("asked", "transport"), [("auto", "shared_memory"), ("nccl", "nccl"), ("ipc", "ipc")])
def test_auto_is_the_transport_that_was_tested(asked: str, transport: str) -> None:
    assert job(learner={"transport": asked}).transport == transport


def test_with_ipc_worker_and_learner_share_a_gpu() -> None:
    assert ray_remote_args(job(learner={"transport": "ipc"}), True)["num_gpus"] == 0.5


def test_an_actor_asks_for_gpus_where_there_are_any() -> None:
    spec = job(rollout={"tensor_parallel": 2})
    assert {key: value for key, value in ray_remote_args(spec, True).items() if key.startswith("num")} == {
        "num_cpus": 0,
        "num_gpus": 2,
    }
    assert {key: value for key, value in ray_remote_args(spec, False).items() if key.startswith("num")} == {
        "num_cpus": 1,
        "num_gpus": 0,
    }


def test_pickled_messages_to_the_engine_are_allowed_only_where_ipc_handles_need_them() -> None:
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    assert name not in actor_environment(job(), gpus=True)
    assert actor_environment(job(learner={"transport": "ipc"}), gpus=True)[name] == "1"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in actor_environment(job(), gpus=True)
    assert actor_environment(job(), gpus=False)["TORCHDYNAMO_DISABLE"] == "1"
