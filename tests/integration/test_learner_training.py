"""What a learner step computes, with real DeepSpeed, against a reference that knows none of this package's loss."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from learner_probe import Learners, Reference, ask, job, make_samples, tensors

from sapo_ray.errors import TrainingFailed
from sapo_ray.learner.batching import plan_step
from sapo_ray.types import PolicyVersion, TrainSample

pytestmark = pytest.mark.integration

V1 = PolicyVersion(1, 1)

SPLITS = [
    pytest.param(1, 4096, id="1 rank, 1 micro-batch"),
    pytest.param(1, 90, id="1 rank, many micro-batches"),
    pytest.param(2, 90, id="2 ranks, uneven micro-batches"),
]


@pytest.mark.parametrize(("ranks", "budget"), SPLITS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
async def test_gradient_and_update_are_those_of_the_plain_loss_under_any_split(
    learners: Learners, stage: int, ranks: int, budget: int
) -> None:
    spec = job(learners.model, zero_stage=stage, ranks=ranks, tokens_per_micro_batch=budget)
    # One completion of the last group was not graded.
    group, samples = await learners.with_job(spec), make_samples()[:-1]
    plan = plan_step(samples, spec, 0)
    if ranks == 2:
        counts = [[len(micro) for micro in rank.mini_batches[0]] for rank in plan.ranks]
        assert counts == [[3, 3, 4, 5, 1], [3, 3, 4, 5, 0]], "the second rank has a padding micro-batch"

    reference = Reference(learners.model, spec)
    members = plan.members[0]
    by_id = {(s.group_id, s.sample_index): s for s in samples}
    payloads = {id: ray.get(by_id[id].payload) for id in members}
    with torch.no_grad():
        old = {id: reference.logp(payloads[id]) for id in members}
    reference.loss(members, by_id, payloads, old).backward()  # type: ignore[no-untyped-call]
    expected = reference.gradients()

    for actor, part in zip(group._actors, plan.ranks, strict=True):
        ray.get(actor.load_batch.remote(part, *(samples[i].payload for i in part.samples)))
    await ask(group, "prepare")
    await ask(group, "forward_backward", 0)
    gradients = (await ask(group, "gradients"))[0]
    assert sorted(gradients) == sorted(expected)
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=2e-4, atol=2e-6, err_msg=name)

    report = (await ask(group, "optim_step", 0))[0]
    await ask(group, "finish_step")
    reference.optimizer.zero_grad()
    losses = reference.train(samples, plan.members)
    assert report.loss == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    assert report.grad_norm == pytest.approx(reference.norms[0], rel=1e-4)
    assert report.grad_norm > spec.learner.grad_clip, "clipping is meant to be in force"
    if stage > 0:
        for norm in await ask(group, "deepspeed_norm"):
            assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    published = tensors(await group.publish(V1))
    for name, value in reference.parameters().items():
        np.testing.assert_allclose(published[name].numpy(), value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2), (3, 2)])
async def test_r_is_exactly_1_in_the_first_of_4_mini_batches_and_not_in_the_others(
    learners: Learners, stage: int, ranks: int
) -> None:
    spec = job(learners.model, zero_stage=stage, ranks=ranks, mini_batches=4, tokens_per_micro_batch=90)
    group, samples = await learners.with_job(spec), make_samples()
    report = await group.train(0, samples)
    assert [update.max_log_ratio > 0 for update in report.details] == [False, True, True, True]
    assert report.updates == 4
    assert report.metrics["log_ratio/max_pos"] > 1e-3

    reference = Reference(learners.model, spec)
    losses = reference.train(samples, plan_step(samples, spec, 0).members)
    assert [update.loss for update in report.details] == pytest.approx(losses, rel=1e-3, abs=1e-5)
    published = tensors(await group.publish(V1))
    for name, value in reference.parameters().items():
        np.testing.assert_allclose(published[name].numpy(), value, rtol=1e-3, atol=1e-5, err_msg=name)


async def test_a_single_update_needs_no_second_forward_pass_and_has_the_same_gradient(learners: Learners) -> None:
    """mini_batches 1, epochs 1: r is 1 whatever the rollouts; epochs 2 starts with the very same update."""
    samples = make_samples()
    reports = []
    for epochs in (1, 2):
        group = await learners.with_job(job(learners.model, zero_stage=0, epochs=epochs))
        reports.append(await group.train(0, samples))
    once, twice = reports
    assert len(once.details) == 1
    assert len(twice.details) == 2
    assert once.details[0].loss == twice.details[0].loss
    assert once.details[0].grad_norm == twice.details[0].grad_norm
    assert twice.details[1].max_log_ratio > 0


async def test_bypass_takes_r_against_the_samplers_log_probs(learners: Learners) -> None:
    algorithm = {"old_logprobs": "bypass", "correction": "none"}
    group = await learners.with_job(job(learners.model, zero_stage=0, mini_batches=2, algorithm=algorithm))
    report = await group.train(0, make_samples())
    assert report.details[0].max_log_ratio > 0.1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
async def test_bfloat16_training_follows_the_float32_reference_within_its_precision(
    learners: Learners, stage: int
) -> None:
    spec = job(learners.model, zero_stage=stage, ranks=2, dtype="bfloat16", tokens_per_micro_batch=90)
    group, samples = await learners.with_job(spec), make_samples()
    report = await group.train(0, samples)
    reference = Reference(learners.model, spec)
    losses = reference.train(samples, plan_step(samples, spec, 0).members)
    assert report.details[0].loss == pytest.approx(losses[0], abs=0.02)
    assert report.details[0].grad_norm == pytest.approx(reference.norms[0], rel=0.03)
    if stage > 0:
        assert report.details[0].grad_norm == pytest.approx((await ask(group, "deepspeed_norm"))[0], rel=1e-3)
    assert report.updates == 1
    published = tensors(await group.publish(V1))
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    for name, value in reference.parameters().items():
        np.testing.assert_allclose(published[name].float().numpy(), value, rtol=1e-2, atol=2e-3, err_msg=name)


async def test_the_learning_rate_is_that_of_the_update_number(learners: Learners) -> None:
    spec = job(learners.model, zero_stage=2, mini_batches=2, steps=2, schedule="linear", lr=0.004, warmup_updates=1)
    group = await learners.with_job(spec)
    rates = [update.lr for step in range(2) for update in (await group.train(step, make_samples(step))).details]
    assert rates == pytest.approx([0.002, 0.004, 0.004 * 2 / 3, 0.004 / 3])


async def test_nothing_is_compiled_just_in_time(learners: Learners) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=3, ranks=2))
    await group.train(0, make_samples())
    assert await ask(group, "files") == [[], []]


def poisoned(samples: list[TrainSample], groups: set[str], value: float) -> list[TrainSample]:
    """An advantage that is not finite, for the first sample of each of the groups."""
    return [
        dataclasses.replace(s, advantage=value) if s.group_id in groups and s.sample_index == 0 else s for s in samples
    ]


@pytest.mark.parametrize(
    ("stage", "dtype", "value"),
    [
        (0, "float32", math.nan),
        (1, "float32", math.nan),
        (1, "bfloat16", math.nan),
        (2, "float32", math.nan),
        (3, "float32", math.inf),
        (3, "bfloat16", math.nan),
    ],
)
async def test_an_update_with_a_non_finite_gradient_changes_nothing_and_the_next_goes_on(
    learners: Learners, stage: int, dtype: str, value: float
) -> None:
    """The poison sits in one sample, so on one rank only; the decision is everybody's."""
    spec = job(learners.model, zero_stage=stage, ranks=2, dtype=dtype, mini_batches=2, tokens_per_micro_batch=90)
    samples = make_samples()
    first, second = plan_step(samples, spec, 0).members
    group = await learners.with_job(spec)
    before = (await group.publish(PolicyVersion(1, 0))).manifest
    report = await group.train(0, poisoned(samples, {first[0][0], second[0][0]}, value))
    assert report.updates == 0
    assert report.nonfinite == 2
    assert sorted(report.dropped) == sorted((s.group_id, s.sample_index) for s in samples)
    unchanged = (await group.publish(PolicyVersion(1, 0))).manifest
    assert unchanged.fingerprint == before.fingerprint

    # What follows is what it would have been without the skipped updates: nothing of them stayed behind.
    after = await group.train(1, make_samples(1))
    assert after.updates == 2
    clean = await learners.with_job(spec)
    step_1 = await clean.train(1, make_samples(1))
    assert step_1.details[0].loss == after.details[0].loss
    assert step_1.details[0].grad_norm == after.details[0].grad_norm
    assert step_1.details[1].loss == pytest.approx(after.details[1].loss, rel=1e-6)


async def test_only_the_samples_of_the_skipped_update_are_dropped(learners: Learners) -> None:
    spec = job(learners.model, zero_stage=2, ranks=2, mini_batches=4)
    samples = make_samples()
    members = plan_step(samples, spec, 0).members
    group = await learners.with_job(spec)
    report = await group.train(0, poisoned(samples, {members[1][0][0]}, math.nan))
    assert [update.skipped for update in report.details] == [False, True, False, False]
    assert report.dropped == members[1]
    assert report.metrics["learner/nonfinite_updates"] == 1
    assert all(math.isfinite(value) for value in report.metrics.values())


async def test_the_third_skipped_update_in_a_row_fails_the_run_and_keeps_the_batch(
    learners: Learners, tmp_path: Path
) -> None:
    spec = job(learners.model, zero_stage=2, ranks=2, mini_batches=2, run_dir=str(tmp_path))
    group, samples = await learners.with_job(spec), make_samples()
    everywhere = poisoned(samples, {f"g{g}" for g in range(8)}, math.nan)
    await group.train(0, everywhere)
    with pytest.raises(TrainingFailed, match=r"3 updates in a row .*learner.max_nonfinite: 3"):
        await group.train(1, everywhere)
    kept = sorted((tmp_path / "nonfinite").iterdir())
    assert [file.name for file in kept] == ["step-000001-update-0-rank-0.jsonl", "step-000001-update-0-rank-1.jsonl"]
    records = [json.loads(line) for file in kept for line in file.read_text().splitlines()]
    members = plan_step(samples, spec, 1).members[0]
    assert sorted((r["group_id"], r["sample_index"]) for r in records) == sorted(members)
    assert all(len(r["token_ids"]) == len(r["rollout_logprobs"]) > 0 for r in records)


async def test_a_skipped_update_between_good_ones_starts_the_count_anew(learners: Learners) -> None:
    spec = job(learners.model, zero_stage=2, ranks=2)
    group, samples = await learners.with_job(spec), make_samples()
    bad = poisoned(samples, {"g0"}, math.nan)
    for step, batch in enumerate([bad, bad, samples, bad, bad, samples]):
        await group.train(step, batch)
