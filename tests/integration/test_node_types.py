"""A cluster with nodes for each role, and Ray's own autoscaler in charge of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_control import orders
from harness import rows
from ray_jobs import LABEL, Cluster
from test_controlled_run import control_for, launch

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

IDLE_S = 6.0


def node_type(role: str, cpus: int, least: int, most: int, store: int) -> dict[str, Any]:
    return {
        "resources": {"CPU": cpus, "object_store_memory": store << 20},
        "labels": {LABEL: role},
        "node_config": {},
        "min_workers": least,
        "max_workers": most,
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """No room for an actor on the head; learner and verifier nodes are there, rollout nodes only when asked for."""
    types = {
        "rollout": node_type("rollout", 1, 0, 3, 200),
        "learner": node_type("learner", 2, 1, 1, 600),
        "verifier": node_type("verifier", 2, 1, 1, 200),
    }
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), cpus=0, node_types=types)
    yield cluster
    cluster.stop()


def until(what: str, condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.5)


def test_rollout_nodes_come_and_go_with_the_workers_of_a_run_and_learner_nodes_stay(
    cluster: Cluster, tmp_path: Any
) -> None:
    """1 -> 3 -> 1 workers while it trains, then a pause."""
    until("the learner's and the verifiers' nodes", lambda: set(cluster.nodes()) == {"learner", "verifier"}, 120)
    standing = cluster.nodes()
    bounds = ["rollout.workers=1", "rollout.max_workers=3", "rollout.drain_timeout_s=5", "checkpoint.every=0"]
    control = control_for(tmp_path, "learner.ranks=2", "verifier.workers=1", "steps=2000", *bounds)
    control.orders = orders(rollout_workers=1, rollout_max=3)
    heard: list[dict[str, Any]] = []
    control.on_event = heard.append
    name = launch(cluster, control, tmp_path, 1)

    def steps() -> int:
        return sum(event["kind"] == "step" for event in heard)

    def has(workers: int) -> bool:
        counts = [event for event in heard if event["kind"] == "workers"]
        return bool(counts) and all(counts[-1][key] == workers for key in ("wanted", "ready"))

    def goes_on() -> None:
        before = steps()
        until("another step", lambda: steps() > before, 120)

    until("the first step", lambda: steps() >= 1, 600)
    rollout = cluster.nodes()["rollout"]
    assert len(rollout) == 1

    control.orders = orders(rollout_workers=3, rollout_max=3)
    until("three workers", lambda: has(3), 300)
    nodes = cluster.nodes()
    assert len(nodes["rollout"]) == 3
    assert set(rollout) < set(nodes["rollout"])
    assert {role: nodes[role] for role in ("learner", "verifier")} == standing
    goes_on()

    control.orders = orders(rollout_workers=1, rollout_max=3)
    until("one worker", lambda: has(1), 120)
    until("the end of idle rollout nodes", lambda: len(cluster.nodes()["rollout"]) == 1, 3 * IDLE_S + 30)
    nodes = cluster.nodes()
    assert {role: nodes[role] for role in ("learner", "verifier")} == standing
    goes_on()

    control.orders = orders(rollout_workers=1, rollout_max=3, state="pause")
    assert cluster.wait(name)["status"] == "SUCCEEDED", cluster.logs(name)[-4000:]
    control.stop()
    assert heard[-1]["state"] == "paused"
    assert [event for event in heard if event.get("condition") == "LearnerLost"] == []
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, steps() + 1))
    until("the end of the last rollout node", lambda: "rollout" not in cluster.nodes(), 3 * IDLE_S + 30)
    assert cluster.nodes() == standing
