"""What the loop does when it is told to pause, to end or to checkpoint."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_control import orders
from fakes import Bench, FakeLearner, job

from sapo_ray.api.link import Orders, Received
from sapo_ray.driver import orders as standing
from sapo_ray.driver.orders import Ended, StandingOrders
from sapo_ray.errors import Superseded
from sapo_ray.types import Prompt


def order(**changes: Any) -> Orders:
    return Orders(**orders(**changes))


@dataclass
class OrderedLearner(FakeLearner):
    """Orders arrive while it works at given steps."""

    arriving: dict[int, Orders] = field(default_factory=dict)
    desk: StandingOrders = field(default_factory=StandingOrders)
    hang_at: int | None = None

    async def train(self, step: int, samples: list[Any]) -> Any:
        if step in self.arriving:
            self.desk.receive(self.arriving[step])
        if step == self.hang_at:
            await asyncio.sleep(3600)
        return await super().train(step, samples)


def bench(run_dir: Path, spec: Any, *, hang_at: int | None = None, **arriving: Orders) -> Bench:
    """`at2=order(...)`: it arrives during step 2."""
    run_dir.mkdir(exist_ok=True)
    desk = StandingOrders(order())
    learner = OrderedLearner(
        arriving={int(at.removeprefix("at")): one for at, one in arriving.items()}, desk=desk, hang_at=hang_at
    )
    return Bench(run_dir, spec, learner=learner, orders=desk)


NO_CHECKPOINTS = {"every": 0, "min_free_gb": 0}


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("pauses_in", [1, 3, 4])
async def test_a_paused_and_resumed_run_trains_on_what_an_uninterrupted_one_does(
    tmp_path: Path, staleness: int, pauses_in: int
) -> None:
    spec = job(steps=5, rollout__max_staleness=staleness, checkpoint=NO_CHECKPOINTS)
    whole = Bench(tmp_path / "whole", spec)
    whole.run_dir.mkdir()
    await whole.attempt()

    first = bench(tmp_path / "paused", spec, **{f"at{pauses_in}": order(state="pause")})
    outcome = await first.attempt(1)
    assert (outcome.ending, outcome.steps) == ("paused", pauses_in), "the step under way was finished"
    assert (first.run_dir / "checkpoints" / "latest").read_text() == f"step-{pauses_in:06d}"
    second = first.next_life()
    outcome = await second.attempt(2)
    assert (outcome.ending, outcome.steps) == (None, 5)
    assert second.learner.trained == whole.learner.trained
    assert second.prompts.taken == whole.prompts.taken


async def test_groups_under_way_at_a_pause_finish_and_are_not_sampled_again(tmp_path: Path) -> None:
    spec = job(steps=4, rollout__max_staleness=2, checkpoint=NO_CHECKPOINTS)
    first = bench(tmp_path, spec, at1=order(state="pause"))
    first.rollouts.slowness = 0.1
    await first.attempt(1)
    issued = {record["group"] for record in first.journal("issued")}
    assert issued == {f"t:{i}:0" for i in range(12)}, "three batches; nothing was issued after the pause"
    second = first.next_life()
    await second.attempt(2)
    assert {request.group_id for request in second.rollouts.requests} == {f"t:{i}:0" for i in range(12, 16)}


async def test_a_pause_does_not_wait_for_groups_beyond_their_deadline_and_issues_them_again(tmp_path: Path) -> None:
    spec = job(steps=3, rollout__max_staleness=1, rollout__group_deadline_s=0.2, checkpoint=NO_CHECKPOINTS)
    first = bench(tmp_path, spec, at1=order(state="pause"))
    first.rollouts.hang = {"t:5:0"}
    outcome = await first.attempt(1)
    assert outcome.ending == "paused"
    second = first.next_life()
    await second.attempt(2)
    assert "t:5:0" in {request.group_id for request in second.rollouts.requests}
    assert [group for group, _, _ in second.learner.trained[1]][::4] == ["t:4:0", "t:5:0", "t:6:0", "t:7:0"]


async def test_a_pause_during_the_last_step_lets_the_run_succeed(tmp_path: Path) -> None:
    first = bench(tmp_path, job(), at3=order(state="pause"))
    outcome = await first.attempt()
    assert (outcome.ending, outcome.steps) == (None, 3)


async def test_a_cancelled_run_finishes_a_short_step_and_takes_no_other(tmp_path: Path) -> None:
    first = bench(tmp_path, job(), at2=order(state="cancel"))
    outcome = await first.attempt()
    assert (outcome.ending, outcome.abandoned, outcome.steps) == ("cancelled", False, 2)
    assert str(outcome.published.manifest.version) == "1.2"
    assert [record["step"] for record in first.journal("step")] == [1, 2]


async def test_a_cancelled_run_abandons_a_step_that_lasts_and_keeps_the_weights_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "CANCEL_S", 0.1)
    spec = job(deadlines={"step_s": 3600})
    first = bench(tmp_path, spec, at2=order(state="cancel"), hang_at=2)
    outcome = await asyncio.wait_for(first.attempt(), 20)
    assert (outcome.ending, outcome.abandoned, outcome.steps) == ("cancelled", True, 1)
    assert str(outcome.published.manifest.version) == "1.1"


async def test_a_cancelled_run_does_not_wait_for_completions_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "CANCEL_S", 0.1)
    spec = job(rollout__group_deadline_s=3600, deadlines={"batch_s": 3600}, checkpoint=NO_CHECKPOINTS)
    first = bench(tmp_path, spec)
    first.rollouts.hang = {"t:5:0"}
    running = asyncio.create_task(first.attempt())
    while not first.rows.rows or first.rollouts.under_way != 1:  # noqa: ASYNC110 - the driver has no event for it
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.2)  # step 1 is recorded, the driver waits for t:5:0
    first.orders.receive(order(state="cancel", discard=True))
    outcome = await asyncio.wait_for(running, 20)
    assert (outcome.ending, outcome.abandoned, outcome.steps) == ("cancelled", True, 1)
    assert first.orders.discard


async def test_a_cancel_that_came_before_the_first_step_takes_none(tmp_path: Path) -> None:
    first = bench(tmp_path, job())
    first.orders.receive(order(state="cancel"))
    outcome = await first.attempt()
    assert (outcome.ending, outcome.steps) == ("cancelled", 0)
    assert first.learner.trained == []


async def test_a_cancel_in_an_evaluation_abandons_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "CANCEL_S", 0.1)
    spec = job(evaluation={"every": 2}, checkpoint=NO_CHECKPOINTS, deadlines={"evaluation_s": 3600})
    first = bench(tmp_path, spec)
    measure = first.rollouts.generate

    def ordered(request: Any) -> Any:
        if request.group_id == "held-out" and first.learner.number == 2:
            first.orders.receive(order(state="cancel"))
            first.rollouts.hang = {"held-out"}
        return measure(request)

    first.rollouts.generate = ordered  # type: ignore[method-assign]
    first.evaluation = [Prompt(id="held-out", index=0, source="t", text="1+1=", token_ids=(1,), gold="2")]
    outcome = await asyncio.wait_for(first.attempt(), 20)
    assert (outcome.ending, outcome.abandoned, outcome.steps) == ("cancelled", False, 2)


@pytest.mark.parametrize(("order_", "ends"), [("pause", "paused"), ("cancel, discard", "cancelled")])
async def test_an_order_does_not_wait_for_a_learner_that_hangs_while_it_loads_a_checkpoint(
    tmp_path: Path, order_: str, ends: str
) -> None:
    first = bench(tmp_path, job(), at2=order(state="pause"))
    assert (await first.attempt()).ending == "paused"
    second = first.next_life()
    second.orders = StandingOrders(order())

    async def hangs(folder: Path) -> None:
        second.orders.receive(order(state=order_.partition(",")[0], discard="discard" in order_))
        await asyncio.sleep(3600)

    second.learner.load = hangs  # type: ignore[method-assign]
    with pytest.raises(Ended) as ended:
        await asyncio.wait_for(second.attempt(2), 20)
    assert ended.value.state == ends


async def test_a_requested_checkpoint_is_made_once_after_the_step_under_way(tmp_path: Path) -> None:
    spec = job(steps=5, checkpoint=NO_CHECKPOINTS)
    first = bench(tmp_path, spec, at2=order(checkpoint_request=1), at4=order(checkpoint_request=1))
    await first.attempt()
    assert [record["step"] for record in first.journal("checkpoint")] == [2, 5], "as asked, and the last"


async def test_a_run_that_another_attempt_took_over_ends_in_mid_step(tmp_path: Path) -> None:
    first = bench(tmp_path, job(deadlines={"step_s": 3600}), hang_at=2)

    async def under_control() -> Any:
        async with first.orders.heeded(lambda _: None):
            return await first.attempt()

    running = asyncio.create_task(under_control())
    while not first.rows.rows:  # noqa: ASYNC110 - the driver has no event for it
        await asyncio.sleep(0.001)
    await asyncio.to_thread(first.orders.fail, Superseded("attempt 1 was superseded"))
    with pytest.raises(Superseded, match="attempt 1 was superseded"):
        await asyncio.wait_for(running, 20)


async def test_a_start_ends_at_once_unless_a_checkpoint_is_to_be_exported() -> None:
    for state, has_checkpoint, discard, ends in (
        ("pause", False, False, True),
        ("pause", True, False, True),
        ("cancel", False, False, True),
        ("cancel", True, False, False),
        ("cancel", True, True, True),
    ):
        desk = StandingOrders(order(state=state, discard=discard))
        ended = False
        try:
            async with desk.heeded(desk.start_patience(has_checkpoint=has_checkpoint)):
                await asyncio.sleep(0.05)
        except Ended:
            ended = True
        assert ended is ends, (state, has_checkpoint, discard)


async def test_a_timeout_of_the_body_itself_stays_one() -> None:
    desk = StandingOrders(order())
    with pytest.raises(TimeoutError):
        async with desk.heeded(desk.step_patience), asyncio.timeout(0.01):
            await asyncio.sleep(10)
    desk.receive(order(state="cancel"))  # nothing is left that it could cut short
    async with desk.heeded(lambda _: None):
        await asyncio.sleep(0)


def test_a_control_plane_that_says_more_than_this_driver_knows_is_understood() -> None:
    orders = {"state": "pause", "discard": False, "rollout_workers": 2, "checkpoint_request": 0, "generation": 3}
    received = Received.model_validate({"next_seq": 8, "orders": orders | {"drain": True}, "hint": "later"})
    assert (received.next_seq, received.orders.state) == (8, "pause")
