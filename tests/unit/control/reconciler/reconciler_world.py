"""A small world for the reconciler: a real store, a strict cluster, a clock that the test moves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from strict_cluster import Driver, StrictCluster

from sapo_ray.control.reconciler import Limits, Reconciler
from sapo_ray.control.reconciler.admission import Admission
from sapo_ray.control.reconciler.hooks import Hooks
from sapo_ray.control.store import AttemptRow, EventRow, JobRow, Store, attempts, events, jobs

LIMITS = Limits(max_running_per_tenant=2, retry_delay_s=1.0, tick_s=0.01, pause_grace_s=900.0)


class Clock:
    """Stands still, but for what the test adds: however slow the machine is, no more than that has passed."""

    def __init__(self) -> None:
        self._now = time.time()
        self.ahead = 0.0

    def __call__(self) -> float:
        self._now += 1e-6  # no two moments are the same
        return self._now + self.ahead


class World:
    """What a test of the reconciler talks to."""

    def __init__(self, store: Store, clock: Clock, runs: Path) -> None:
        self.store = store
        self.clock = clock
        self.runs = runs
        self.cluster = StrictCluster()
        self.waits: list[tuple[str, float]] = []
        self.failures: list[str] = []
        self.reconciler = self.new_reconciler()

    def new_reconciler(self, store: Any = None, cluster: Any = None, limits: Limits = LIMITS) -> Reconciler:
        """Another replica, or the one after a crash."""
        hooks = Hooks(
            admitted=lambda tenant, waited: self.waits.append((tenant, waited)), failed_round=self.failures.append
        )
        return Reconciler(
            store or self.store,
            cluster or self.cluster,
            limits,
            control_url="http://control",
            hooks=hooks,
            clock=self.clock,
        )

    def submit(self, tenant: str = "t", priority: int = 50) -> str:
        """A job as the API makes it."""
        with self.store.begin() as s:
            row = jobs.create_job(
                s,
                tenant=tenant,
                name="n",
                spec={},
                steps=10,
                priority=priority,
                labels={},
                scale=(1, 4, 1),
                runs_root=self.runs,
            )
            return row.id

    def admit_and_die(self) -> None:
        """A replica that admits what is queued and is killed before it launches anything."""
        Admission(self.store, "dead replica", LIMITS, Hooks(), self.clock).admit("t")

    def tick(self, times: int = 1, every_s: float = 0.0) -> None:
        for _ in range(times):
            self.clock.ahead += every_s
            self.reconciler.tick()

    def quiet_for(self, seconds: float) -> None:
        """Time passes, rounds go on, nobody reports."""
        while seconds > 0:
            self.tick(every_s=min(seconds, 10.0))
            seconds -= 10.0

    def job(self, id: str) -> JobRow:
        with self.store.read() as s:
            row = jobs.get_job(s, None, id)
            assert row is not None
            return row

    def attempt(self, id: str) -> AttemptRow:
        """The newest."""
        with self.store.read() as s:
            return attempts.list_attempts(s, id)[-1]

    def events(self, id: str) -> list[EventRow]:
        with self.store.read() as s:
            return events.list_events(s, id, 0, 10_000)

    def states(self, id: str) -> list[str]:
        """All states the job went through."""
        return [
            event.data["state"] for event in self.events(id) if event.kind == "transition" and event.attempt is None
        ]

    def driver(self, id: str) -> Driver:
        """The newest driver of a job."""
        return self.cluster.of_job(id)[-1]

    def report(self, id: str, *said: dict[str, Any], driver: Driver | None = None) -> None:
        """The newest driver delivers events, as the link's route would take them."""
        driver = driver or self.driver(id)
        with self.store.begin() as s:
            found = attempts.by_token(s, driver.token)
            assert found is not None, "the driver's token is not accepted"
            assert (found.job_id, found.number) == (id, driver.request.attempt)
            events.ingest(s, id, found.number, found.next_seq, list(said), self.clock())

    def says(self, id: str, state: str, reason: str = "") -> None:
        """The newest driver reports a transition."""
        self.report(id, {"time": self.clock(), "kind": "transition", "state": state, "reason": reason})

    def running(self, **job: Any) -> str:
        """A job whose driver runs and has reported."""
        id = self.submit(**job)
        self.tick()
        self.driver(id).become("RUNNING")
        self.says(id, "running")
        assert self.job(id).state == "running"
        return id

    def ask(self, id: str, desired: str, *, discard: bool = False) -> None:
        """What the routes `:pause` and `:cancel` do."""
        with self.store.begin() as s:
            row = jobs.get_job(s, None, id, lock=True)
            assert row is not None
            row.desired_state, row.discard = desired, discard
            idle = row.state in ("queued", "paused")
            state = {"pause": "paused" if idle else "pausing", "cancel": "cancelled" if idle else "cancelling"}[desired]
            jobs.set_state(s, row, state, "asked for", allowed={row.state})

    def resume(self, id: str) -> None:
        """What the route `:resume` does."""
        with self.store.begin() as s:
            row = jobs.get_job(s, None, id, lock=True)
            assert row is not None
            row.desired_state = "run"
            jobs.set_state(s, row, "queued", "resumed", allowed={"paused"})
