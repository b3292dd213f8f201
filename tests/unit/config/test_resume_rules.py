"""What identifies a run, what changed, and what a resume may change."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_ray.config.load import changed_keys, check_resume, resolve, resume_job, spec_hash, to_json
from sapo_ray.errors import ConfigError

QUICK = {"preset": "quickstart"}
BASE = resolve(QUICK)


def test_a_stored_job_reads_back_the_same():
    job = resolve(QUICK, ["data.train.1.path=more.jsonl", "learner.betas=[0.8,0.9]", "model.warm_start_accuracy=null"])
    assert resolve(json.loads(to_json(job))) == job


def test_a_stored_job_names_every_key():
    stored = json.loads(to_json(BASE))
    assert stored["learner"]["eps"] == 1e-8
    assert stored["data"]["train"][0]["gold"] == "auto"


def test_changed_keys_are_dotted_in_the_order_of_the_job():
    new = resolve(QUICK, ["deadlines.step_s=5", "steps=61", "data.train.0.limit=3", "learner.betas.1=0.95"])
    assert changed_keys(BASE, new) == ["steps", "data.train.0.limit", "learner.betas.1", "deadlines.step_s"]
    assert changed_keys(BASE, resolve(QUICK)) == []


def test_a_list_that_grew_is_one_changed_key():
    assert changed_keys(BASE, resolve(QUICK, ["data.train.1.path=more.jsonl"])) == ["data.train"]


def test_a_resume_may_change_steps_workers_checkpoints_evaluation_logging_deadlines_and_secrets():
    overrides = [
        "steps=80",
        "rollout.workers=3",
        "checkpoint.every=5",
        "evaluation.data.0.limit=9",
        "logging.sample_groups=0",
        "deadlines.batch_s=9",
        "secrets=[HF_TOKEN]",
    ]
    new, changed = resume_job(json.loads(to_json(BASE)), overrides)
    assert changed == [
        "steps",
        "secrets",
        "rollout.workers",
        "checkpoint.every",
        "evaluation.data.0.limit",
        "logging.sample_groups",
        "deadlines.batch_s",
    ]
    assert (new.steps, new.rollout.workers) == (80, 3)


def test_a_resume_that_changes_anything_else_is_refused_by_key_with_the_way_out():
    with pytest.raises(ConfigError) as caught:
        resume_job(json.loads(to_json(BASE)), ["learner.lr=1e-3", "rollout.max_staleness=1", "steps=70"])
    assert str(caught.value).startswith(
        "a resumed run cannot change rollout.max_staleness, learner.lr; it may change steps"
    )
    assert "rollout.workers, rollout.min_workers" in str(caught.value)
    assert "start a new job" in str(caught.value)


ALLOWED = [
    "steps=61",
    "rollout.workers=9",
    "rollout.drain_timeout_s=1",
    "checkpoint.keep=5",
    "evaluation.every=3",
    "deadlines.start_s=1",
]
REFUSED = ["seed=1", "learner.ranks=1", "rollout.group_size=8", "algorithm.gate=erf", "data.shuffle=false", "name=x"]
REFUSED += ["model.revision=main", "verifier.deadline_s=1", "data.train.0.limit=7"]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(ALLOWED + REFUSED), max_size=4, unique=True))
def test_the_hash_changes_exactly_when_a_resume_would_be_refused(overrides: list[str]):
    new = resolve(QUICK, overrides)
    allowed = all(one in ALLOWED for one in overrides)
    assert (spec_hash(new) == spec_hash(BASE)) == allowed
    if allowed:
        assert len(check_resume(BASE, new)) == len(overrides)
    else:
        with pytest.raises(ConfigError, match="a resumed run cannot change"):
            check_resume(BASE, new)


def test_a_run_that_moved_to_another_folder_is_still_the_same_run():
    assert spec_hash(resolve(QUICK, ["run_dir=elsewhere"])) == spec_hash(BASE)
