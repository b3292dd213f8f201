"""The batch of an update that was not finite, as it is kept for people: any tool reads it, and no bit of it is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sapo_ray.learner.batching import RankPlan, Row
from sapo_ray.learner.offending import keep_offending
from sapo_ray.types import CompletionPayload

PAYLOADS = [
    CompletionPayload(
        prompt_token_ids=np.array([1, 2], np.int32),
        token_ids=np.array([3, 4, 5], np.int32),
        logprobs=np.array([-0.5, np.nan, -np.inf], np.float32),
        text="half a pair \ud800 and ∑",
    )
]


def plan() -> RankPlan:
    row = Row(slot=0, id=("s:1:0", 3), group=0, prompt_tokens=2, tokens=3, advantage=1.5, weight=0.25, ages=())
    return RankPlan(step=7, samples=(0,), mini_batches=((), ((row,),)), updates=(0, 1))


def refuse(word: str) -> float:
    raise AssertionError(f"{word} is not JSON")


def test_a_batch_with_what_json_does_not_have_is_json_all_the_same(tmp_path: Path) -> None:
    said = keep_offending(tmp_path, plan(), 1, PAYLOADS, rank=2)
    assert said == f"the offending batch is kept in {tmp_path / 'nonfinite'}"
    (file,) = (tmp_path / "nonfinite").iterdir()
    assert file.name == "step-000007-update-1-rank-2.jsonl"
    (record,) = [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]
    assert record == {
        "group_id": "s:1:0",
        "sample_index": 3,
        "advantage": 1.5,
        "loss_weight": 0.25,
        "prompt_token_ids": [1, 2],
        "token_ids": [3, 4, 5],
        "rollout_logprobs": [-0.5, "nan", "-inf"],
        "text": "half a pair \ud800 and ∑",
    }
    assert np.array(record["rollout_logprobs"], np.float32).tobytes() == PAYLOADS[0].logprobs.tobytes()


def test_a_batch_that_cannot_be_kept_does_not_hide_why_the_job_failed(tmp_path: Path) -> None:
    (tmp_path / "nonfinite").write_text("in the way")
    assert "could not be kept" in keep_offending(tmp_path, plan(), 1, PAYLOADS, rank=0)
