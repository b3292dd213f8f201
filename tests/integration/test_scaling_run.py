"""A run whose rollout workers come and go in its midst, with real engines: nothing is lost, doubled or disturbed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from fake_control import orders
from ray.util.placement_group import placement_group, remove_placement_group
from test_run import SMALL

from sapo_ray.api.link import Orders
from sapo_ray.config.load import load_job
from sapo_ray.driver import run as runs
from sapo_ray.driver.journal import read_journal
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.rundir import begin_attempt
from sapo_ray.types import sampling_seed

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
GROUPS, SIZE, HELD_OUT = 4, 4, 32
Event = dict[str, Any]


def learner_pids() -> set[int]:
    """Of this session's learner ranks."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended a moment ago
            if "ray::LearnerWorker" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


@dataclass
class Scripted:
    """Stands where the link does: hears events, and gives the next order when the present one was followed."""

    desk: StandingOrders

    script: list[Callable[[Event], bool]]
    """Each is given events until it returns true; what it does is its own affair."""
    pids: list[set[int]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def open(self, journal: Any) -> None: ...

    def activity(self) -> list[Any]:
        return []

    def close(self) -> None:
        self.ended.set()

    def hear(self, event: Event) -> None:
        if event["kind"] == "step":
            self.pids.append(learner_pids())
        if self.script and self.script[0](event):
            self.script.pop(0)


def is_step(event: Event) -> bool:
    return bool(event["kind"] == "step")


def is_count(event: Event, **numbers: int) -> bool:
    return event["kind"] == "workers" and all(event[name] == number for name, number in numbers.items())


def test_workers_come_and_go_while_learners_train_on(ray_session: None, tmp_path: Path) -> None:
    """1 -> 3 -> 1 (a drain that must give back) -> 2, for which the cluster has no room until the test makes it.

    More are asked for in the midst of the first evaluation, fewer in the midst of another.
    """
    settings = [
        *SMALL, "verifier.reward=null",
        "steps=2000", "rollout.workers=1", "rollout.max_workers=4", "rollout.drain_timeout_s=0.2",
        "rollout.max_new_tokens=400", "learner.tokens_per_micro_batch=8192", "rollout.max_staleness=1",
        "learner.ranks=1", f"rollout.prompts_per_step={GROUPS}", f"rollout.group_size={SIZE}", "checkpoint.every=3",
        "evaluation.data=[{path: builtin:addition, split: heldout}]", f"evaluation.limit={HELD_OUT}",
        "evaluation.every=3", "evaluation.samples=0",
    ]  # fmt: skip
    spec = load_job(ROOT / "configs" / "quickstart.yaml", settings)
    desk = StandingOrders(Orders(**orders(rollout_max=4)))
    hog: list[Any] = []
    pending_steps: list[int] = []
    room: list[float] = []
    """Logical CPUs that are free while one worker runs; other tests' actors may hold some of the cluster."""

    def ask(workers: int, **more: Any) -> bool:
        desk.receive(Orders(**orders(rollout_workers=workers, rollout_max=4, **more)))
        return True

    def fill_the_cluster(event: Event) -> bool:
        """Once the drained workers' room is free again: all but what runs is taken, then one more is asked for."""
        free = ray.available_resources().get("CPU", 0)
        if not is_step(event) or free < room[0]:
            return False
        hog.append(placement_group([{"CPU": free}]))
        assert hog[0].wait(30)
        return ask(2)

    def make_room(event: Event) -> bool:
        pending_steps.append(event["step"])
        if len(pending_steps) < 3:
            return False
        remove_placement_group(hog[0])
        return True

    def begin(event: Event) -> bool:
        if event.get("phase") != "evaluate_before":
            return False
        room.append(ray.available_resources().get("CPU", 0))
        return ask(3)

    script: list[Callable[[Event], bool]] = [
        begin,
        lambda event: is_count(event, ready=3, draining=0),
        is_step,
        is_step,
        lambda event: event.get("phase") == "evaluate" and ask(1),
        lambda event: is_count(event, wanted=1, ready=1, draining=0),
        fill_the_cluster,
        lambda event: event.get("condition") == "NoCapacity",
        lambda event: is_step(event) and make_room(event),
        lambda event: is_count(event, wanted=2, ready=2, pending=0),
        is_step,
        lambda event: is_step(event) and ask(2, state="pause"),
    ]
    link = Scripted(desk, script)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    begin_attempt(run_dir, 1)
    began = time.monotonic()
    by = runs.Assigned(attempt=1, orders=desk, link=link)  # type: ignore[arg-type]
    result = runs.assigned(spec, run_dir, [], by)
    print(f"{time.monotonic() - began:.0f} s, {result['steps']} steps")
    assert (result["status"], link.script) == ("paused", [])
    records = list(read_journal(run_dir / "journal.jsonl"))

    def of(kind: str, **fields: Any) -> list[Event]:
        return [one for one in records if one["kind"] == kind and all(one.get(k) == v for k, v in fields.items())]

    assert len(link.pids[0]) == 1
    assert all(pids == link.pids[0] for pids in link.pids), "learners go on undisturbed"
    assert [(one["from"], one["to"], one["why"]) for one in of("scaling")] == [
        (1, 3, "order"), (3, 1, "order"), (1, 2, "order"),
    ]  # fmt: skip

    # The ledger: each issued group is consumed once, in order, but those that are outstanding at the end.
    issued = [one["group"] for one in of("issued")]
    consumed = [group for one in of("consumed") for group in one["groups"]]
    assert len(set(issued)) == len(issued)
    assert consumed == issued[: len(consumed)]
    assert len(issued) - len(consumed) <= 2 * GROUPS
    assert of("dropped") == []
    assert of("condition", condition="Quarantined") == []

    # The drain: what was not finished, and nothing else, was asked for again, under the same seeds.
    assert {one["worker"] for one in of("worker", what="worker_stopped")} == {"rollout-1", "rollout-2"}
    given_back = sum(one["given_back"] for one in of("worker", what="worker_stopped"))
    graded = {one["group"]: one["completions"] for one in of("graded")}
    assert given_back > 0
    assert all("was scaled away" in one["reason"] for one in of("reissued"))
    # Of a group, what was finished before the drain stays: its requests are counted whole until it is done.
    assert 0 < sum(len(one["missing"]) for one in of("reissued")) <= given_back
    again = [one for one in of("reissued") if one["group"] in graded]
    assert sum(len(one["missing"]) for one in again) == sum(SIZE - one["delivered"] for one in again)
    of_evaluations = [one for one in of("reissued") if one["group"] not in graded]
    assert all((one["missing"], one["delivered"]) == ([0], 0) for one in of_evaluations)
    for one in again:
        made_by = {c["i"]: c["worker"] for c in graded[one["group"]]}
        gone = next(word for word in one["reason"].split() if word.startswith("rollout-"))
        assert {i for i, worker in made_by.items() if worker != gone} == set(one["missing"])
    assert all(sorted(c["i"] for c in group) == list(range(SIZE)) for group in graded.values())
    assert of("worker", what="worker_lost") == []
    assert len({sampling_seed(spec.seed, group, i) for group in graded for i in range(SIZE)}) == SIZE * len(graded)

    # Evaluations are whole, also those in whose midst the workers changed.
    evaluations = of("evaluation")
    assert all((one["greedy"]["completions"], one["greedy"]["errors"]) == (HELD_OUT, 0) for one in evaluations)
    order = [(one["kind"], one.get("to")) for one in records if one["kind"] in ("evaluation", "scaling")]
    first, drained = order.index(("scaling", 3)), order.index(("scaling", 1))
    assert order[first + 1][0] == order[drained + 1][0] == "evaluation"

    # Beyond the cluster's capacity: said, not waited for, and taken back.
    told = [one.get("cleared", False) for one in of("condition", condition="NoCapacity")]
    assert told == [False, True]
    assert pending_steps[-1] - pending_steps[0] == 2, "training went on without the third worker"
    progress = Counter(one.get("cleared", False) for one in of("condition", condition="ScaleInProgress"))
    assert progress[True] == 3
    joined = [one["worker"] for one in of("worker", what="worker_ready")]
    assert joined[0] == "rollout-0"
    assert sorted(joined[1:3]) == ["rollout-1", "rollout-2"]
    assert joined[3:] == ["rollout-1.1"]
    used = {c["worker"] for group in graded.values() for c in group}
    assert "rollout-0" in used
    assert used & {"rollout-1", "rollout-2"}
    versions = [(one["version"], len(one["workers"])) for one in of("published")]
    assert max(count for _, count in versions) == 3
    oldest = [row for one in of("step") for row in [one["metrics"]["age/sample_max"]]]
    assert max(oldest) <= 1
