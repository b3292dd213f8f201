"""The reconciler with a cluster for each job: what users see of it, and that nothing is left behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_operator import PODS
from kube_world import SPEC, KubeWorld

from sapo_ray.control.reconciler import Hooks, Limits, Reconciler
from sapo_ray.control.reconciler.tokens import read_token
from sapo_ray.control.store import JobRow, Store, attempts, events, jobs

LIMITS = Limits(retry_delay_s=0.01, clusters_s=0.0, nodes_s=0.0, max_running_per_tenant=8)


class Service:
    """A control plane without its routes; `restart` makes another process of it."""

    def __init__(self, kube: KubeWorld, store: Store, runs: Path) -> None:
        self.kube, self.store, self.runs = kube, store, runs
        self.failures: list[str] = []
        self.restart()

    def restart(self, **limits: float) -> None:
        launcher = self.kube.launcher()
        bounds = Limits(**{name: getattr(LIMITS, name) for name in LIMITS.__slots__} | limits)
        hooks = Hooks(failed_round=self.failures.append)
        given: dict[str, Any] = {"clusters": launcher, "clock": self.clock, "hooks": hooks, "holder": "one"}
        self.reconciler = Reconciler(self.store, launcher, bounds, control_url="http://c", **given)

    def clock(self) -> float:
        return time.time() + self.kube.ahead

    def submit(self, workers: int = 8) -> str:
        with self.store.begin() as s:
            given = {"tenant": "t", "name": "n", "spec": SPEC, "steps": 10, "priority": 50, "labels": {}}
            return jobs.create_job(s, **given, scale=(1, 40, workers), runs_root=self.runs).id

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.reconciler.tick()

    def running(self, workers: int = 8) -> str:
        """A job whose driver runs and has reported."""
        job = self.submit(workers)
        self.tick()
        self.kube.operator.work()
        self.tick()
        self.says(job, kind="transition", state="running", reason="")
        return job

    def says(self, job: str, **event: Any) -> None:
        """The newest driver reports an event."""
        with self.store.begin() as s:
            attempt = attempts.list_attempts(s, job)[-1]
            events.ingest(s, job, attempt.number, attempt.next_seq, [{"time": time.time()} | event], self.clock())

    def row(self, job: str) -> JobRow:
        with self.store.read() as s:
            row = jobs.get_job(s, None, job)
            assert row is not None
            return row

    def conditions(self, job: str) -> dict[str, str]:
        return {one["type"]: one["reason"] for one in self.row(job).conditions}

    def ask(self, job: str, desired: str, state: str) -> None:
        with self.store.begin() as s:
            row = jobs.get_job(s, None, job, lock=True)
            assert row is not None
            row.desired_state = desired
            jobs.set_state(s, row, state, "asked for", allowed={row.state})


@pytest.fixture
def service(kube: KubeWorld, tmp_path: Path, migrated_sqlite: Path) -> Iterator[Service]:
    shutil.copy(migrated_sqlite, tmp_path / "jobs.db")
    store = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield Service(kube, store, tmp_path / "runs")
    store.close()


def cluster(job: str, attempt: int = 1) -> str:
    return f"sapo-{job}-{attempt}"


def test_a_job_says_what_its_cluster_waits_for_until_it_does_not(kube: KubeWorld, service: Service) -> None:
    kube.operator.nodes = 3
    job = service.submit()
    service.tick()
    kube.operator.work()
    service.tick()
    assert service.row(job).state == "starting"
    (reason,) = service.conditions(job).values()
    assert service.conditions(job).keys() == {"ClusterPending"}
    assert "learner: 0 of 1 ready, 1 Unschedulable: 0/3 nodes are available" in reason
    kube.operator.nodes, kube.operator.waiting = 100, {"learner": "ImagePullBackOff"}
    kube.operator.work()
    service.tick(3)
    assert service.conditions(job) == {
        "ClusterPending": "the job's cluster is being made: learner: 0 of 1 ready, 1 ImagePullBackOff"
    }
    kube.operator.waiting = {}
    kube.operator.work()
    service.tick()
    assert service.conditions(job) == {}
    assert kube.heads.submissions == [cluster(job)]
    with service.store.read() as s:
        said = [one.data for one in events.list_events(s, job, 0, 100) if one.kind == "condition"]
    assert len(said) == 4  # three reasons, each once, and that it is over
    assert said[-1] == {"condition": "ClusterPending", "cleared": True}


def test_a_restart_of_the_service_at_any_moment_starts_one_driver_in_one_cluster(
    kube: KubeWorld, service: Service
) -> None:
    job = service.submit()
    for _ in range(4):
        service.restart()
        service.tick()
        kube.operator.work()
    assert kube.heads.submissions == [cluster(job)]
    assert list(kube.clusters()) == [cluster(job)]
    token = read_token(Path(service.row(job).run_dir), 1)
    with service.store.read() as s:
        found = attempts.by_token(s, token or "")
        assert found is not None
        assert (found.job_id, found.state) == (job, "launched")


def test_a_job_that_is_cancelled_while_its_cluster_is_made_leaves_none(kube: KubeWorld, service: Service) -> None:
    job = service.submit()
    service.tick()
    service.ask(job, "cancel", "cancelling")
    service.tick(2)
    assert service.row(job).state == "cancelled"
    assert service.conditions(job) == {}
    assert kube.clusters() == {}
    assert kube.heads.submissions == []


def test_a_cluster_goes_after_its_driver_and_the_log_is_kept(kube: KubeWorld, service: Service) -> None:
    job = service.running()
    service.says(job, kind="transition", state="succeeded", reason="done")
    kube.heads.become(cluster(job), "SUCCEEDED")
    service.tick(2)
    assert service.row(job).state == "succeeded"
    assert kube.clusters() == {}
    assert kube.kube.of(PODS) == {}
    log = Path(service.row(job).run_dir) / "logs" / "driver-1.log"
    assert log.read_text() == f"log of {cluster(job)}"


def test_a_cluster_is_kept_as_long_as_the_operator_wants(kube: KubeWorld, service: Service) -> None:
    job = service.running()
    service.restart(keep_clusters_s=600.0)
    service.says(job, kind="transition", state="succeeded", reason="done")
    kube.heads.become(cluster(job), "SUCCEEDED")
    service.tick(2)
    kube.ahead = 590
    service.tick()
    assert list(kube.clusters()) == [cluster(job)]
    kube.ahead = 610
    service.tick()
    assert kube.clusters() == {}


def test_clusters_of_deleted_jobs_and_of_jobs_that_could_not_be_held_are_removed(
    kube: KubeWorld, service: Service
) -> None:
    job = service.submit()
    service.tick()
    with service.store.begin() as s:
        s.delete(jobs.get_job(s, None, job))
    service.tick()
    assert kube.clusters() == {}
    big = service.submit(workers=8)
    with service.store.begin() as s:
        row = jobs.get_job(s, None, big, lock=True)
        assert row is not None
        row.scale_min = row.scale_target = 40
    service.tick()
    assert service.row(big).state == "failed"
    assert service.row(big).reason == (
        "the cluster cannot hold this job: the job needs 10 rollout nodes, and may have 8 at most"
    )


def test_a_lost_head_costs_a_restart_in_a_new_cluster(kube: KubeWorld, service: Service) -> None:
    job = service.running()
    kube.kube.delete(PODS, f"{cluster(job)}-head")
    service.tick()
    assert service.row(job).state == "running"
    kube.ahead = 20  # silent for longer than a driver outlives its cluster
    service.tick()
    kube.ahead = 30
    for _ in range(3):
        service.tick()
        kube.operator.work()
    assert (service.row(job).state, service.row(job).restarts) == ("starting", 1)
    assert list(kube.clusters()) == [cluster(job, 2)]
    assert kube.heads.submissions == [cluster(job), cluster(job, 2)]


def test_one_jobs_head_that_does_not_answer_is_nobody_elses_trouble(kube: KubeWorld, service: Service) -> None:
    deaf = service.running()
    del kube.heads.drivers[cluster(deaf)]
    answer = kube.heads.answer
    kube.heads.answer = lambda method, path, *rest: None if deaf in path else answer(method, path, *rest)  # type: ignore[method-assign]
    job = service.submit()
    service.tick()
    kube.operator.work()
    service.tick()
    assert service.conditions(deaf) == {"LauncherUnavailable": "the cluster cannot be reached"}
    assert (service.conditions(job), set(service.failures)) == ({}, {"cluster"})  # `launcher` would page somebody
    assert kube.heads.submissions == [cluster(deaf), cluster(job)]


def test_a_quota_that_is_used_up_is_a_queue_and_keeps_no_other_job_waiting(kube: KubeWorld, service: Service) -> None:
    kube.kube.quota = {"ray.io/v1/rayclusters": 1}
    running, waiting = service.running(), service.submit()
    service.tick(2)
    assert service.conditions(waiting) == {
        "ClusterPending": "a quota of Kubernetes is used up; the job's cluster is made when there is room"
    }
    assert service.conditions(running) == {}
    service.says(running, kind="transition", state="succeeded", reason="done")
    kube.heads.become(cluster(running), "SUCCEEDED")
    service.tick(3)
    assert list(kube.clusters()) == [cluster(waiting)]


@pytest.mark.parametrize("code", [403, 500, 503])
def test_a_cluster_that_kubernetes_does_not_let_be_made_is_one_jobs_trouble_and_ended_ones_go(
    kube: KubeWorld, service: Service, code: int
) -> None:
    running = service.running()
    kube.kube.fault = lambda method, path: code if method == "POST" and "rayclusters" in path else None
    refused = service.submit()
    service.says(running, kind="transition", state="succeeded", reason="done")
    kube.heads.become(cluster(running), "SUCCEEDED")
    service.tick(3)
    assert service.conditions(refused) == {"LauncherUnavailable": "the cluster cannot be reached"}
    assert service.row(running).state == "succeeded"
    assert kube.clusters() == {}
    kube.kube.fault = lambda method, path: None
    service.tick()
    assert list(kube.clusters()) == [cluster(refused)]


def test_a_kubernetes_api_that_is_away_loses_nothing(kube: KubeWorld, service: Service) -> None:
    job = service.running()
    kube.kube.fault = lambda method, path: "lost"
    service.tick(3)
    assert service.row(job).state == "running"
    waiting = service.submit()
    service.tick()
    assert service.row(waiting).state == "queued"
    assert (set(service.conditions(waiting)), set(service.failures)) == ({"LauncherUnavailable"}, {"launcher"})
    kube.kube.fault = lambda method, path: None
    service.tick()
    assert service.row(waiting).state == "starting"
    assert service.conditions(job) == {}


def test_nodes_follow_what_the_driver_says_of_its_workers(kube: KubeWorld, service: Service) -> None:
    job = service.running()
    name = cluster(job)
    counts = {"ready": 8, "starting": 0, "pending": 0, "draining": 0, "given_up": 0}
    there = sorted(kube.operator.pods(name, "rollout"))
    service.says(job, kind="workers", wanted=12, **counts, nodes=there)
    service.tick(2)
    assert kube.group(name, "rollout")["replicas"] == 3
    assert service.conditions(job) == {"ClusterPending": "rollout: 2 of 3 ready, no pod yet for the others"}
    kube.operator.work()
    service.tick()
    assert service.conditions(job) == {}
    third = max(kube.operator.pods(name, "rollout"))
    service.says(job, kind="workers", wanted=4, **counts | {"draining": 8}, nodes=[*there, third])
    service.tick()
    assert kube.group(name, "rollout")["replicas"] == 3  # they drain
    kube.operator.busy = {third}
    service.says(job, kind="workers", wanted=4, **counts | {"ready": 4}, nodes=[third])
    service.tick()
    kube.operator.work()
    assert list(kube.operator.pods(name, "rollout")) == [third]
    assert kube.operator.chosen_by_itself == []


def test_a_driver_that_does_not_say_where_its_workers_are_loses_no_node(kube: KubeWorld, service: Service) -> None:
    job = service.running()
    service.says(job, kind="workers", wanted=1, ready=1, starting=0, pending=0, draining=0, given_up=0)
    service.tick(2)
    assert kube.group(cluster(job), "rollout")["replicas"] == 2
