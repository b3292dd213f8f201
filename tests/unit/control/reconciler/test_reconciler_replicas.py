"""Several reconcilers on one PostgreSQL, dying at random: every job is launched once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from mortal import Crash, MortalCluster, MortalStore
from strict_cluster import StrictCluster

from sapo_ray.control.reconciler import Limits, Reconciler
from sapo_ray.control.store import AttemptRow, JobRow, Store, attempts, events, jobs

JOBS = 50
LIMITS = Limits(max_running_per_tenant=5, lease_s=0.5, tick_s=0.01, retry_delay_s=0.1, forgotten_grace_s=60.0)
BOUND_S = 90.0


class Unlucky:
    """Kills its process at one effect in `one_in`."""

    def __init__(self, seed: int, one_in: int) -> None:
        self._random = random.Random(seed)
        self._one_in = one_in

    def effect(self) -> None:
        if self._random.randrange(self._one_in) == 0:
            raise Crash

    def after(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            result = function(*arguments)
            self.effect()
            return result

        return call


def replica(store: Store, cluster: StrictCluster, seed: int, deaths: Counter[int], stop: threading.Event) -> None:
    """One replica that is started again whenever it dies. Its leases stay behind, as those of a killed process do."""
    unlucky = Unlucky(seed, one_in=25)
    while not stop.is_set():
        reconciler = Reconciler(
            MortalStore(store, unlucky),  # type: ignore[arg-type]
            MortalCluster(cluster, unlucky),  # type: ignore[arg-type]
            LIMITS,
            control_url="http://control",
        )
        try:
            while not stop.is_set():
                reconciler.tick()
                stop.wait(LIMITS.tick_s)
        except Crash:
            deaths[seed] += 1


def finish_drivers(store: Store, cluster: StrictCluster, most_alive: list[int]) -> None:
    """Each driver runs a moment, reports success with its own token, and exits."""
    with store.read() as s:
        most_alive.append(jobs.count_live(s, "t"))
    for driver in list(cluster.drivers.values()):
        if driver.state == "PENDING":
            driver.become("RUNNING")
        elif driver.state == "RUNNING":
            with store.begin() as s:
                attempt = attempts.by_token(s, driver.token)
                assert attempt is not None, f"{driver.request.submission_id} was launched with a token that is void"
                done = {"time": time.time(), "kind": "transition", "state": "succeeded"}
                events.ingest(s, attempt.job_id, attempt.number, attempt.next_seq, [done])
            driver.become("SUCCEEDED")


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_two_replicas_that_die_at_random_launch_fifty_jobs_once_each(
    open_store: Callable[[], Store], tmp_path: Path
) -> None:
    store = open_store()
    cluster = StrictCluster()
    ids = []
    with store.begin() as s:
        for _ in range(JOBS):
            row = jobs.create_job(
                s,
                tenant="t",
                name="n",
                spec={},
                steps=1,
                priority=50,
                labels={},
                scale=(1, 1, 1),
                runs_root=tmp_path,
            )
            ids.append(row.id)
    stop = threading.Event()
    deaths: Counter[int] = Counter()
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            replica(open_store(), cluster, seed, deaths, stop)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    most_alive: list[int] = []
    deadline = time.monotonic() + BOUND_S
    try:
        while time.monotonic() < deadline and not failures:
            finish_drivers(store, cluster, most_alive)
            with store.read() as s:
                states = Counter(s.scalars(JobRow.__table__.select().with_only_columns(JobRow.state)))
                open_attempts = s.query(AttemptRow).where(AttemptRow.state != "ended").count()
            if states == {"succeeded": JOBS} and open_attempts == 0:
                break
            time.sleep(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30.0)
    assert not failures
    assert states == {"succeeded": JOBS}
    assert sorted(cluster.drivers) == [f"sapo-{id}-1" for id in sorted(ids)]
    assert max(most_alive) <= LIMITS.max_running_per_tenant
    assert min(deaths[1], deaths[2]) >= 5, f"too few deaths for this test to tell anything: {deaths}"
    assert cluster.stops.total() == 0
