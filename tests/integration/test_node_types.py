"""A cluster with nodes for each role, and Ray's own autoscaler in charge of them."""

from __future__ import annotations

import threading
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


def test_rollout_nodes_come_and_go_with_the_workers_and_learner_nodes_stay(cluster: Cluster, tmp_path: Any) -> None:
    until("the learner's and the verifiers' nodes", lambda: set(cluster.nodes()) == {"learner", "verifier"}, 120)
    standing = cluster.nodes()
    control = control_for(tmp_path, "learner.ranks=2", "verifier.workers=1", "steps=3")
    control.orders = orders(rollout_workers=2)
    first = threading.Event()
    control.on_event = lambda event: first.set() if (event["kind"], event.get("step")) == ("step", 1) else None
    name = launch(cluster, control, tmp_path, 1)
    assert first.wait(600), cluster.logs(name)[-4000:]
    nodes = cluster.nodes()
    assert len(nodes["rollout"]) == 2
    assert {role: nodes[role] for role in ("learner", "verifier")} == standing
    assert cluster.wait(name)["status"] == "SUCCEEDED", cluster.logs(name)[-4000:]
    control.stop()
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    until("the end of idle rollout nodes", lambda: "rollout" not in cluster.nodes(), 3 * IDLE_S + 30)
    assert cluster.nodes() == standing
