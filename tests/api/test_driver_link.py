"""The driver's link against the real service in a process of its own, killed while it is used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_server import ServerProcess
from fakes import job

from sapo_ray.control.store import Store, attempts, events, jobs
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.link import Link
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.wire import Wire
from sapo_ray.errors import Superseded

pytestmark = pytest.mark.slow


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


class Service(ServerProcess):
    """Killed and started again on the same data and port."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, f"sqlite:///{folder / 'control.db'}", SAPO_LINK_INTERVAL_S="0.05")
        self.folder = folder
        self.start()
        self.store = Store(self.database_url)

    def stored(self, job_id: str) -> list[tuple[int, int, str]]:
        with self.store.read() as session:
            rows = events.list_events(session, job_id, 0, 10_000)
            return [(row.attempt or 0, row.seq or 0, row.kind) for row in rows if row.source == "driver"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    yield service
    service.kill()
    service.store.close()


def launched(service: Service) -> tuple[str, str]:
    """A job whose first attempt has a driver; its id and the driver's token."""
    with service.store.begin() as session:
        row = jobs.create_job(
            session,
            tenant="default",
            name="job",
            spec=job().model_dump(mode="json"),
            steps=3,
            priority=50,
            labels={},
            scale=(1, 1, 1),
            runs_root=service.folder / "runs",
        )
        jobs.set_state(session, row, "starting", "launched", allowed={"queued"})
        _, token = attempts.begin_attempt(session, row)
        return row.id, token


def test_a_service_killed_under_load_holds_every_event_once_and_in_order(service: Service) -> None:
    job_id, token = launched(service)
    wire, orders = Wire(service.url, job_id, 1, token), StandingOrders()
    assignment = wire.assignment()
    assert (assignment.job_id, assignment.attempt, assignment.spec["steps"]) == (job_id, 1, 3)
    link = Link(wire, orders)
    run_dir = Path(assignment.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    journal = Journal(run_dir / "journal.jsonl", 1, link.hear)
    link.open(journal)
    journal.event("transition", state="running")
    for number in range(1, 1001):
        journal.event("step", step=number, steps=1000, drops={}, metrics={"reward/mean": number / 1000})
        if number % 400 == 0:
            until(lambda: len(service.stored(job_id)) > 1)
            service.kill()
        if number % 400 == 200 and number > 400:
            service.start()
        time.sleep(0.0005)
    until(lambda: len(service.stored(job_id)) == 1001)

    with service.store.begin() as session:
        row = jobs.get_job(session, None, job_id, lock=True)
        assert row is not None
        assert (row.state, row.step, row.summary["reward"]) == ("running", 1000, 1.0)
        row.desired_state = "pause"
    until(lambda: orders.ending == "paused")
    journal.event("transition", state="paused", reason="as asked")
    link.close()
    journal.close()
    wire.close()
    kinds = ["transition", *["step"] * 1000, "transition"]
    assert service.stored(job_id) == [(1, seq, kind) for seq, kind in enumerate(kinds, 1)]
    with service.store.read() as session:
        row = jobs.get_job(session, None, job_id)
        assert row is not None
        assert (row.state, row.reason) == ("paused", "as asked")


def test_a_driver_whose_job_has_a_newer_attempt_is_told_so_by_the_service(service: Service, tmp_path: Path) -> None:
    job_id, token = launched(service)
    wire, orders = Wire(service.url, job_id, 1, token), StandingOrders()
    link = Link(wire, orders)
    journal = Journal(tmp_path / "journal.jsonl", 1, link.hear)
    link.open(journal)
    journal.event("transition", state="running")
    until(lambda: len(service.stored(job_id)) == 1)
    with service.store.begin() as session:
        row = jobs.get_job(session, None, job_id, lock=True)
        assert row is not None
        attempts.begin_attempt(session, row)

    def fenced() -> bool:
        try:
            journal.event("phase", phase="train")
        except Superseded:
            return True
        return False

    until(fenced)
    with pytest.raises(Superseded):
        orders.check()
    link.close()
    journal.close()
    assert len(service.stored(job_id)) == 1
