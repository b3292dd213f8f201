"""Events: exactly once, contiguous, in the order in which they become visible."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from store_builders import new_job, started_job, step, together

from sapo_ray.control.store import BadBatch, SequenceGap, Store, Superseded, attempts, events, jobs


def seen(store: Store, job_id: str) -> list[tuple[int, str, str, int | None]]:
    with store.read() as s:
        return [(row.id, row.source, row.kind, row.seq) for row in events.list_events(s, job_id, 0, 10_000)]


def deliver(store: Store, job_id: str, first: int, batch: list[dict[str, Any]], attempt: int = 1) -> int:
    with store.begin() as s:
        return events.ingest(s, job_id, attempt, first, batch).next_seq


def test_a_delivery_that_comes_twice_is_stored_once(store: Store) -> None:
    job_id = started_job(store)
    assert deliver(store, job_id, 1, [step(1), step(2)]) == 3
    assert deliver(store, job_id, 1, [step(1), step(2)]) == 3
    assert seen(store, job_id)[2:] == [(3, "driver", "step", 1), (4, "driver", "step", 2)]


def test_a_delivery_that_overlaps_adds_only_its_new_events(store: Store) -> None:
    job_id = started_job(store)
    deliver(store, job_id, 1, [step(1), step(2)])
    assert deliver(store, job_id, 2, [step(2), step(3), step(4)]) == 5
    assert [seq for _, source, _, seq in seen(store, job_id) if source == "driver"] == [1, 2, 3, 4]


def test_a_gap_is_refused_with_what_is_expected_and_nothing_is_stored(store: Store) -> None:
    job_id = started_job(store)
    deliver(store, job_id, 1, [step(1)])
    with pytest.raises(SequenceGap) as refused:
        deliver(store, job_id, 3, [step(3)])
    assert refused.value.expected == 2
    assert len(seen(store, job_id)) == 3


def test_an_empty_delivery_is_a_sign_of_life_and_a_gap_shows_in_it_too(store: Store) -> None:
    job_id = started_job(store)
    with store.begin() as s:
        reply = events.ingest(s, job_id, 1, 1, [], now=5e9)
        assert (reply.next_seq, reply.job.last_heard) == (1, 5e9)
    with pytest.raises(SequenceGap):
        deliver(store, job_id, 2, [])
    with store.read() as s:
        attempt = attempts.get_attempt(s, job_id, 1)
        assert attempt is not None
        assert attempt.last_heard == 5e9


def test_a_superseded_attempt_is_told_the_newest_and_stores_nothing(store: Store) -> None:
    job_id = started_job(store)
    with store.begin() as s:
        row = jobs.get_job(s, None, job_id, lock=True)
        assert row is not None
        attempts.begin_attempt(s, row)
    with pytest.raises(Superseded) as refused:
        deliver(store, job_id, 1, [step(1)], attempt=1)
    assert refused.value.current_attempt == 2
    assert deliver(store, job_id, 1, [step(1)], attempt=2) == 2
    assert len(seen(store, job_id)) == 3


def test_events_that_are_not_numbered_as_the_delivery_says_are_refused(store: Store) -> None:
    job_id = started_job(store)
    with pytest.raises(BadBatch, match=r"events\[1\]\.seq must be 2"):
        deliver(store, job_id, 1, [step(1), step(3)])
    assert len(seen(store, job_id)) == 2


def test_whatever_a_driver_writes_is_stored(store: Store) -> None:
    job_id = started_job(store)
    odd: list[dict[str, Any]] = [
        {"kind": "telepathy", "from": "Mars"},
        {"kind": 7, "time": "noon"},
        {},
        {"kind": "transition", "state": "levitating"},
        {"kind": "step", "step": 2**80, "metrics": {"reward/mean": float("nan")}, "time": float("inf")},
        {"kind": "condition", "condition": "No\0tes", "reason": "lone surrogate \ud800 and NUL \0"},
        {"kind": "transition", "state": ["running"]},
    ]
    assert deliver(store, job_id, 1, odd) == 8
    with store.read() as s:
        stored = events.list_events(s, job_id, 2, 100)
        job = jobs.get_job(s, None, job_id)
    assert [row.kind for row in stored] == [
        "telepathy",
        "unknown",
        "unknown",
        "transition",
        "step",
        "condition",
        "transition",
    ]
    assert stored[0].data == {"from": "Mars"}
    assert stored[4].data["metrics"] == {"reward/mean": None}
    assert job is not None
    assert (job.state, job.step) == ("starting", 0)
    assert job.conditions[0]["reason"] == "lone surrogate ? and NUL \ufffd"


def test_every_change_of_state_is_one_control_event_right_after_what_caused_it(store: Store) -> None:
    job_id = started_job(store)
    deliver(store, job_id, 1, [{"kind": "transition", "state": "running"}, {"kind": "phase", "phase": "train"}])
    assert seen(store, job_id) == [
        (1, "control", "transition", None),
        (2, "control", "transition", None),
        (3, "driver", "transition", 1),
        (4, "control", "transition", None),
        (5, "driver", "phase", 2),
    ]
    with store.read() as s:
        data = events.list_events(s, job_id, 3, 1)[0].data
    assert data == {"state": "running", "previous": "starting", "reason": "the driver is running"}


def test_pages_of_events_follow_one_another_and_can_be_of_one_kind(store: Store) -> None:
    job_id = started_job(store)
    deliver(store, job_id, 1, [step(1), {"kind": "phase"}, step(3)])
    with store.read() as s:
        assert [row.id for row in events.list_events(s, job_id, 2, 2)] == [3, 4]
        assert [row.id for row in events.list_events(s, job_id, 4, 2)] == [5]
        assert events.list_events(s, job_id, 2**80, 2) == []
        assert [row.seq for row in events.list_events(s, job_id, 0, 10, kinds={"step"})] == [1, 3]
        assert events.newest_ids(s, [job_id, "job-gone"]) == {job_id: 5}


def test_the_same_delivery_from_eight_threads_is_stored_once(open_store: Callable[[], Store]) -> None:
    stores = [open_store() for _ in range(2)]
    job_id = started_job(stores[0])
    batch = [step(seq) for seq in range(1, 51)]
    assert together(8, lambda index: deliver(stores[index % 2], job_id, 1, batch)) == [51] * 8
    rows = seen(stores[0], job_id)
    assert [id for id, *_ in rows] == list(range(1, 53))
    assert [seq for *_, seq in rows[2:]] == list(range(1, 51))


def test_ids_have_no_gap_when_api_and_driver_write_at_once(open_store: Callable[[], Store]) -> None:
    stores = [open_store() for _ in range(3)]
    job_id = started_job(stores[0])

    def write(index: int) -> None:
        for number in range(20):
            if index == 0:
                deliver(stores[0], job_id, number + 1, [step(number + 1)])
                continue
            with stores[index % 3].begin() as s:
                # Half of them without having locked the row: ids must not depend on that.
                row = jobs.get_job(s, "acme", job_id, lock=index % 2 == 0)
                assert row is not None
                events.append_control_event(s, row, "note", by=index)

    assert together(5, write) == [None] * 5
    rows = seen(stores[0], job_id)
    assert [id for id, *_ in rows] == list(range(1, 103))
    assert [seq for _, source, _, seq in rows if source == "driver"] == list(range(1, 21))
    with stores[0].read() as s:
        assert events.newest_ids(s, [job_id]) == {job_id: 102}


def test_whoever_reads_while_others_write_never_sees_an_id_before_the_one_below_it(
    open_store: Callable[[], Store],
) -> None:
    writers, reader = [open_store() for _ in range(2)], open_store()
    job_id = started_job(writers[0])
    done = threading.Event()

    def work(index: int) -> list[int]:
        if index < 4:
            for _ in range(25):
                with writers[index % 2].begin() as s:
                    row = jobs.get_job(s, None, job_id)
                    assert row is not None
                    events.append_control_event(s, row, "note")
            return []
        followed = [0]
        while not (done.is_set() and followed[-1] == 102):
            with reader.read() as s:
                followed += [row.id for row in events.list_events(s, job_id, followed[-1], 1000)]
            if followed[-1] == 102:
                done.set()
        return followed

    assert together(5, work)[4] == list(range(103))


def test_what_a_failed_transaction_appended_leaves_no_gap(store: Store) -> None:
    with store.begin() as s:
        job_id = new_job(s).id

    def fail() -> None:
        with store.begin() as s:
            row = jobs.get_job(s, None, job_id, lock=True)
            assert row is not None
            assert events.append_control_event(s, row, "note") == 2
            raise RuntimeError("the request failed after all")

    with pytest.raises(RuntimeError):
        fail()
    with store.begin() as s:
        row = jobs.get_job(s, None, job_id, lock=True)
        assert row is not None
        assert events.append_control_event(s, row, "note") == 2
