"""Small builders for tests of the store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from sapo_ray.control.store import JobRow, Store, attempts, jobs


def new_job(s: Session, **changes: Any) -> JobRow:
    """A queued job of tenant `acme`."""
    values: dict[str, Any] = {
        "tenant": "acme",
        "name": "sums",
        "spec": {"steps": 60},
        "steps": 60,
        "priority": 50,
        "labels": {},
        "scale": (1, 4, 2),
        "runs_root": Path("/runs"),
    }
    return jobs.create_job(s, **values | changes)


def started_job(store: Store) -> str:
    """A job whose first attempt has been launched; its events so far have ids 1 (queued) and 2 (starting)."""
    with store.begin() as s:
        row = new_job(s)
        attempts.begin_attempt(s, row)
        jobs.set_state(s, row, "starting", "launching attempt 1", allowed={"queued"})
        return row.id


def submit(store: Store) -> str:
    """A job that was accepted."""
    with store.begin() as s:
        return new_job(s).id


def submit_without_end(store: Store, accepted: list[str]) -> None:
    """Ends with an error, or the test has shown nothing."""
    for _ in range(10_000):
        accepted.append(submit(store))  # noqa: PERF401 - what was accepted before the error counts


def count(store: Store) -> int:
    """Jobs that there are."""
    with store.read() as s:
        return len(jobs.list_jobs(s, "acme"))


def step(seq: int) -> dict[str, Any]:
    """As a driver journals it."""
    metrics = {"reward/mean": seq / 100, "rollout/workers": 2.0}
    return {"time": 1e9 + seq, "attempt": 1, "seq": seq, "kind": "step", "step": seq, "steps": 60, "metrics": metrics}


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Call `work` in this many threads that begin at the same moment; what each returned or raised, in their order."""
    start = threading.Barrier(count, timeout=60)
    outcomes: list[Any] = [None] * count

    def run(index: int) -> None:
        start.wait()
        try:
            outcomes[index] = work(index)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return outcomes
