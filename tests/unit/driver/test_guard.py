"""The guard: simulated on a policy whose mismatch grows with the age of its samples, and in the loop with fakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fakes import Bench, FakeLearner, job

from sapo_ray.config.spec import GuardSpec
from sapo_ray.driver.guard import Guard


def simulate(guard: Guard, kl_of_age: Callable[[float, int], float], steps: int) -> tuple[list[int], list[float]]:
    """Batches ahead and KL by step; batches are issued up to `ahead` beyond the one in training, and age meanwhile."""
    queue: list[int] = []
    ahead, kls = [], []
    for step in range(1, steps + 1):
        while len(queue) < guard.ahead + 1:
            queue.append(step)
        age = step - queue.pop(0)
        kls.append(kl_of_age(age, step))
        guard.look(step, {"mismatch/kl": kls[-1], "age/sample_mean": float(age)})
        ahead.append(guard.ahead)
    return ahead, kls


def conditions(guard: Guard, rows: Iterable[dict[str, float]]) -> list[tuple[int, str, bool]]:
    """(step, condition, cleared) of everything that was said."""
    return [
        (step, said["condition"], said.get("cleared", False))
        for step, row in enumerate(rows, 1)
        for said in guard.look(step, row)
    ]


def changes(ahead: list[int]) -> int:
    return sum(one != two for one, two in itertools.pairwise(ahead))


def test_without_trouble_nothing_changes() -> None:
    ahead, _ = simulate(Guard(GuardSpec(), 4), lambda age, _: 0.01 * age, 300)
    assert set(ahead) == {4}


def test_generation_is_throttled_until_the_mismatch_is_within_its_bound_and_stays_there() -> None:
    ahead, kls = simulate(Guard(GuardSpec(max_kl=0.1), 4), lambda age, _: 0.04 * age, 400)
    assert ahead[-1] == 2, "0.04 x 2 is within 0.1, 0.04 x 3 is not"
    assert changes(ahead) == 2
    assert max(kls[40:]) <= 0.1


def test_a_mismatch_that_any_age_has_makes_generation_synchronous_and_then_it_is_another_trouble() -> None:
    guard = Guard(GuardSpec(max_kl=0.1), 2)
    said = conditions(guard, [{"mismatch/kl": 0.5}] * 30)
    assert guard.ahead == 0
    assert [name for _, name, _ in said] == ["Throttled", "Throttled", "Mismatch"]
    assert [name for _, name, _ in conditions(Guard(GuardSpec(), 0), [{"mismatch/kl": 0.5}] * 5)] == ["Mismatch"]


def test_after_the_trouble_is_over_generation_runs_as_far_ahead_as_before_and_the_condition_is_taken_back() -> None:
    guard = Guard(GuardSpec(max_kl=0.1), 3)
    said = conditions(guard, [{"mismatch/kl": 0.2 if step < 20 else 0.01} for step in range(150)])
    assert guard.ahead == 3
    assert said[-1][1:] == ("Throttled", True)
    assert [cleared for _, _, cleared in said].count(True) == 2, "Mismatch and Throttled, each once"


def test_one_bad_step_costs_one_batch_ahead_and_no_more() -> None:
    ahead, _ = simulate(Guard(GuardSpec(max_kl=0.1), 4), lambda _, step: 5.0 if step == 50 else 0.01, 100)
    assert min(ahead) == 3
    assert ahead[-1] == 4


def test_where_no_number_of_batches_is_right_the_tries_become_rare() -> None:
    """One batch ahead is too many, none is calm: a controller without memory would swing for ever."""
    ahead, _ = simulate(Guard(GuardSpec(max_kl=0.1), 1), lambda age, _: 0.2 * age, 2000)
    assert ahead.count(1) / len(ahead) < 0.05
    assert changes(ahead[1000:]) <= 2 * 5


def test_the_mean_age_has_a_bound_of_its_own() -> None:
    ahead, _ = simulate(Guard(GuardSpec(max_age=1.5), 4), lambda _age, _step: 0.0, 200)
    assert ahead[-1] == 1
    assert changes(ahead) == 3


def test_a_ratio_out_of_range_is_said_once_and_taken_back_once() -> None:
    rows = [{"learner/log_ratio_max": value} for value in (1.0, 10.0, 11.0, 1e9, 2.0, 1.0)]
    assert conditions(Guard(GuardSpec(max_ratio=1e4), 0), rows) == [
        (2, "RatioOutOfRange", False),
        (5, "RatioOutOfRange", True),
    ]


def test_a_collapse_of_the_reward_is_told_from_noise_and_from_a_slow_start() -> None:
    def said(rewards: Iterable[float]) -> list[tuple[int, str, bool]]:
        return conditions(Guard(GuardSpec(), 0), ({"reward/mean": one} for one in rewards))

    noise = [0.05 * (-1) ** step for step in range(200)]
    rising = [min(0.8, 0.1 + 0.01 * step) + noise[step] for step in range(100)]
    assert said(rising) == []
    assert said([0.02 + noise[step] for step in range(100)]) == [], "a mean of nothing but noise"
    [collapse, *rest] = said([*rising, *[0.1 + one for one in noise[:30]]])
    assert collapse[1:] == ("RewardCollapse", False)
    assert 101 <= collapse[0] <= 105
    assert rest == []
    assert said([*rising, *[0.1] * 10, *[0.8] * 10])[-1][1:] == ("RewardCollapse", True)
    assert [one[1] for one in said([-0.1] * 20 + [-0.9] * 20)] == ["RewardCollapse"], "rewards may be penalties"


def test_a_learner_that_is_restored_is_no_collapse_of_the_reward_and_a_real_one_is_told_all_the_same() -> None:
    guard = Guard(GuardSpec(reward_drop=0.3), 0)
    rise = [{"reward/mean": 0.01 * step} for step in range(1, 81)]
    assert conditions(guard, rise) == []
    guard.rewind(20)
    assert [guard.look(step, rise[step - 1]) for step in range(21, 80)] == [[]] * 59
    said = [one["condition"] for step in range(80, 95) for one in guard.look(step, {"reward/mean": 0.1})]
    assert said == ["RewardCollapse"]


def test_after_a_restore_generation_is_throttled_as_soon_as_before() -> None:
    guard = Guard(GuardSpec(max_kl=0.1), 4)
    assert [said["condition"] for said in guard.look(100, {"mismatch/kl": 0.2})] == ["Throttled"]
    guard.rewind(50)
    ahead = []
    for step in range(51, 70):
        guard.look(step, {"mismatch/kl": 0.2})
        ahead.append(guard.ahead)
    assert ahead[:7] == [3, 3, 3, 3, 2, 2, 2]


def test_bounds_that_are_null_are_not_looked_at() -> None:
    guard = Guard(GuardSpec(max_kl=None, max_ratio=None, reward_drop=None), 2)
    row = {"mismatch/kl": 9.0, "learner/log_ratio_max": 99.0, "age/sample_mean": 2.0}
    assert conditions(guard, [{**row, "reward/mean": 1.0 / step} for step in range(1, 50)]) == []
    assert guard.ahead == 2


class Drifting(FakeLearner):
    """A learner whose mismatch grows with the age of what it is given."""

    async def train(self, step: int, samples: list[Any]) -> Any:
        report = await super().train(step, samples)
        age = self.ages[-1]
        return SimpleNamespace(metrics={"mismatch/kl": 0.06 * age}, updates=report.updates, dropped=())


async def test_the_loop_runs_less_far_ahead_and_trains_on_no_older_samples(tmp_path: Path) -> None:
    bench = Bench(
        run_dir=tmp_path,
        spec=job(steps=24, rollout__max_staleness=3, checkpoint__every=0),
        learner=Drifting(seconds=0.02),
    )
    await bench.attempt()
    rows = [bench.rows.rows[step] for step in range(1, 25)]
    assert max(row["age/sample_max"] for row in rows[:8]) >= 2, "it did run ahead"
    assert [row["rollout/ahead"] for row in rows][-1] == 1
    assert max(row["mismatch/kl"] for row in rows[-6:]) <= 0.1
    throttled = [event for event in bench.journal("condition") if event["condition"] == "Throttled"]
    assert [event["reason"].split(": ")[1] for event in throttled] == [
        "generation runs 2 batches ahead (rollout.max_staleness 3)",
        "generation runs 1 batch ahead (rollout.max_staleness 3)",
    ]
    assert throttled[0]["reason"].startswith("mismatch/kl 0.")
    issued = [one["group"] for one in bench.journal("issued")]
    consumed = [group for one in bench.journal("consumed") for group in one["groups"]]
    assert consumed == issued[: len(consumed)]
    assert len(issued) == len(set(issued)) == 24 * 4
