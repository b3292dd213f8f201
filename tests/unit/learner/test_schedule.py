"""The learning rate as a function of the update number."""

from __future__ import annotations

from typing import Any

import pytest

from sapo_ray.config.spec import JobSpec
from sapo_ray.learner.schedule import learning_rate


def job(**learner: Any) -> JobSpec:
    """10 updates: 5 steps of 2 mini-batches."""
    return JobSpec.model_validate(
        {
            "steps": 5,
            "model": {"path": "m"},
            "data": {"train": [{"path": "d"}]},
            "learner": {"mini_batches": 2, "lr": 1.0} | learner,
        }
    )


def test_constant_stays() -> None:
    assert [learning_rate(update, job()) for update in (0, 5, 9, 50)] == [1.0] * 4


def test_linear_falls_to_its_end_over_the_whole_run() -> None:
    spec = job(schedule="linear", lr_end=0.2)
    assert [learning_rate(update, spec) for update in (0, 5, 10, 20)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_cosine_is_half_way_in_the_middle() -> None:
    spec = job(schedule="cosine")
    assert [learning_rate(update, spec) for update in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate(2, spec) == pytest.approx(0.9045085)


def test_warm_up_climbs_to_the_peak_and_the_rest_is_what_is_left() -> None:
    spec = job(schedule="linear", warmup_updates=4)
    rates = [learning_rate(update, spec) for update in range(8)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6])


def test_epochs_lengthen_the_run() -> None:
    assert learning_rate(10, job(schedule="linear", epochs=2)) == pytest.approx(0.5)
