"""The jobs in configs/ and the reference page."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapo_ray.config.estimate import estimate
from sapo_ray.config.keys import all_keys
from sapo_ray.config.load import load_job, resolve
from sapo_ray.config.reference import render

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_job_is_valid_resolves_and_can_be_estimated_without_network(path: Path):
    job = load_job(path)
    assert resolve(job.model_dump()) == job
    assert estimate(job).parameters > 0


def test_the_quickstart_has_fewer_than_twelve_lines():
    assert len((ROOT / "configs/quickstart.yaml").read_text().splitlines()) < 12


def test_the_study_is_the_papers_recipe():
    job = load_job(ROOT / "configs/qwen2.5-7b-study.yaml")
    assert job.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert job.model.dtype == "bfloat16"
    assert [(s.path, s.weight) for s in job.data.train] == [("openai/gsm8k", 1.0), ("zwhe99/DeepMath-103K", 1.0)]
    assert (job.data.max_prompt_tokens, job.rollout.max_new_tokens, job.rollout.group_size) == (1536, 512, 8)
    assert job.learner.epochs == 2
    assert job.steps * job.updates_per_step == 5000
    assert (job.learner.lr, job.learner.schedule, job.learner.lr_end, job.learner.warmup_updates) == (
        1e-6,
        "linear",
        0,
        0,
    )
    assert (job.learner.betas, job.learner.eps) == ((0.9, 0.999), 1e-8)
    assert (job.verifier.format_reward, job.verifier.answer) == ("think_answer", "tag")
    assert (job.algorithm.tau_preset, job.evaluation.temperature) == ("study", 0.7)
    assert job.learner.ranks + job.rollout.workers * job.rollout.tensor_parallel == 8
    assert estimate(job).gpus == 8
    assert estimate(job).rank.total < 80e9


def test_what_the_study_does_not_give_is_marked_as_ours():
    lines = (ROOT / "configs/qwen2.5-7b-study.yaml").read_text().splitlines()
    chosen = ["workers", "processes", "correction", "max_staleness", "every", "prompts_per_step", "mini_batches"]
    for key in chosen:
        own = [line for line in lines if line.strip().startswith(f"{key}:")]
        assert own, key
        assert all("# ours" in line for line in own), own


def test_the_reference_page_is_up_to_date():
    assert (ROOT / "docs/jobs.md").read_text() == render(), "run: make docs"


def test_every_key_is_documented():
    assert [name for name, key in all_keys().items() if len(key.doc) < 5] == []
    page = render()
    assert all(f"`{name.rsplit('.', 1)[-1]}`" in page for name in all_keys())
