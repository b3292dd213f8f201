"""Jobs in the store: made, found by their owner only, listed by pages, brought from state to state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import text
from store_builders import new_job, started_job, together

from sapo_ray.control.store import (
    BadCursor,
    DriverExiting,
    EventRow,
    IllegalTransition,
    JobRow,
    Store,
    attempts,
    events,
    jobs,
)
from sapo_ray.control.store.tables import new_id


def test_a_new_job_is_queued_and_says_so_in_its_first_event(store: Store) -> None:
    with store.begin() as s:
        job_id = new_job(s, labels={"team/a": "x"}, scale=(1, 4, 2)).id
    with store.read() as s:
        row = jobs.get_job(s, "acme", job_id)
        first = events.list_events(s, job_id, 0, 10)
    assert row is not None
    assert (row.state, row.desired_state, row.generation, row.attempt) == ("queued", "run", 1, 0)
    assert (row.scale_min, row.scale_max, row.scale_target) == (1, 4, 2)
    assert row.run_dir == f"/runs/{job_id}"
    assert [(event.id, event.kind, event.data["state"]) for event in first] == [(1, "transition", "queued")]


def test_ids_of_later_jobs_sort_later() -> None:
    ids = [new_id("job-", now) for now in (0.0, 1.5, 1e9, 1_763_000_000.000001, 1_763_000_000.000002, 32e9)]
    assert ids == sorted(ids)
    assert {len(id) for id in ids} == {24}


def test_a_job_is_found_by_its_tenant_and_by_nobody_else(store: Store) -> None:
    with store.begin() as s:
        job_id = new_job(s).id
    with store.read() as s:
        assert jobs.get_job(s, "acme", job_id) is not None
        assert jobs.get_job(s, None, job_id) is not None
        assert jobs.get_job(s, "other", job_id) is None
        assert jobs.get_job(s, None, "job-\0' OR 1=1 --........") is None


def test_pages_newest_first_hold_each_job_once_though_others_come_and_go(store: Store) -> None:
    with store.begin() as s:
        ids = [new_job(s).id for _ in range(7)]
    with store.read() as s:
        first = jobs.list_jobs(s, "acme", limit=3)
    with store.begin() as s:
        new_job(s)
        gone = jobs.get_job(s, None, first[-1].id, lock=True)
        assert gone is not None
        jobs.set_state(s, gone, "cancelled", "", allowed={"queued"})
        jobs.delete_job(s, gone)
    with store.read() as s:
        second = jobs.list_jobs(s, "acme", after=first[-1].id, limit=3)
        third = jobs.list_jobs(s, "acme", after=second[-1].id, limit=3)
    assert [row.id for row in [*first, *second, *third]] == ids[::-1]


def test_a_list_can_be_of_one_state_or_label(store: Store) -> None:
    with store.begin() as s:
        plain, labelled = new_job(s).id, new_job(s, labels={"a.b/c": "x", "q": "1"}).id
        row = jobs.get_job(s, None, plain, lock=True)
        assert row is not None
        jobs.set_state(s, row, "paused", "", allowed={"queued"})
    with store.read() as s:
        assert [row.id for row in jobs.list_jobs(s, "acme", state="paused")] == [plain]
        assert [row.id for row in jobs.list_jobs(s, "acme", state=["paused", "queued"])] == [labelled, plain]
        assert [row.id for row in jobs.list_jobs(s, "acme", label=("a.b/c", "x"))] == [labelled]
        assert jobs.list_jobs(s, "acme", label=("a.b/c", "y")) == []
        assert jobs.list_jobs(s, "acme", label=('"$.', "y\0")) == []
        assert jobs.list_jobs(s, "other") == []
        with pytest.raises(BadCursor):
            jobs.list_jobs(s, "acme", after="yesterday")


def test_a_deep_page_is_read_from_one_range_of_an_index(store: Store) -> None:
    query = "SELECT id FROM jobs WHERE tenant = 'acme' AND id < 'job-5' ORDER BY id DESC LIMIT 100"
    with store.begin() as s:
        if store.dialect == "sqlite":
            plan = "\n".join(row[3] for row in s.execute(text(f"EXPLAIN QUERY PLAN {query}")))
            assert "SEARCH jobs USING COVERING INDEX ix_jobs_tenant_id (tenant=? AND id<?)" in plan
            return
        s.execute(text("SET LOCAL enable_seqscan = off"))
        s.execute(text("SET LOCAL enable_bitmapscan = off"))
        plan = "\n".join(row[0] for row in s.execute(text(f"EXPLAIN {query}")))
        assert "ix_jobs_tenant_id" in plan
        assert "Index Cond: ((tenant = 'acme'::text) AND (id < 'job-5'::text))" in plan


def test_a_state_is_left_only_for_what_is_allowed_and_each_change_is_an_event(store: Store) -> None:
    job_id = started_job(store)
    with store.begin() as s:
        row = jobs.get_job(s, "acme", job_id, lock=True)
        assert row is not None
        with pytest.raises(IllegalTransition, match="the job is starting; to become queued it must be paused") as no:
            jobs.set_state(s, row, "queued", "resumed", allowed={"paused"})
        assert no.value.current == "starting"
        jobs.set_state(s, row, "pausing", "asked to pause", allowed={"starting", "running"})
        jobs.bump(row)
    with store.read() as s:
        row = jobs.get_job(s, "acme", job_id)
        newest = events.list_events(s, job_id, 2, 10)
    assert row is not None
    assert (row.state, row.reason, row.generation) == ("pausing", "asked to pause", 2)
    assert row.started_at is not None
    assert [event.data for event in newest] == [
        {"state": "pausing", "previous": "starting", "reason": "asked to pause"}
    ]


def test_a_queue_is_ordered_by_priority_then_age_within_a_tenant(store: Store) -> None:
    with store.begin() as s:
        old, urgent, new = new_job(s), new_job(s, priority=90), new_job(s)
        other = new_job(s, tenant="other")
        rows = [old, urgent, new, other]
        assert [jobs.queue_position(s, row) for row in rows] == [2, 1, 3, 1]
        assert jobs.queue_positions(s, rows) == {old.id: 2, urgent.id: 1, new.id: 3, other.id: 1}
        jobs.set_state(s, urgent, "starting", "", allowed={"queued"})
        assert jobs.queue_positions(s, rows) == {old.id: 1, new.id: 2, other.id: 1}
        assert (jobs.count_live(s, "acme"), jobs.count_live(s, "other")) == (1, 0)
        assert jobs.active_ids(s) == [urgent.id, old.id, new.id, other.id]


def test_a_change_of_a_label_in_place_is_kept(store: Store) -> None:
    with store.begin() as s:
        job_id = new_job(s, labels={"a": "1"}).id
    with store.begin() as s:
        row = jobs.get_job(s, None, job_id, lock=True)
        assert row is not None
        row.labels["b"] = "2"
    with store.read() as s:
        row = jobs.get_job(s, None, job_id)
        assert row is not None
        assert row.labels == {"a": "1", "b": "2"}


def test_a_change_in_a_session_for_reading_is_refused_rather_than_lost(store: Store) -> None:
    job_id = started_job(store)

    def rename() -> None:
        with store.read() as s:
            row = jobs.get_job(s, None, job_id)
            assert row is not None
            row.name = "renamed"

    with pytest.raises(AssertionError, match="session for reading"):
        rename()


def test_of_two_users_who_change_a_job_at_once_neither_change_is_lost(open_store: Callable[[], Store]) -> None:
    stores = [open_store() for _ in range(2)]
    job_id = started_job(stores[0])

    def change(index: int) -> None:
        for _ in range(10):
            with stores[index % 2].begin() as s:
                row = jobs.get_job(s, "acme", job_id, lock=True)
                assert row is not None
                row.checkpoint_request += 1
                jobs.bump(row)

    assert together(4, change) == [None] * 4
    with stores[0].read() as s:
        row = jobs.get_job(s, "acme", job_id)
        assert row is not None
        assert (row.checkpoint_request, row.generation) == (40, 41)


def test_only_an_ended_job_can_be_deleted_and_takes_all_that_is_its_own_along(store: Store) -> None:
    job_id = started_job(store)
    with store.begin() as s:
        row = jobs.get_job(s, None, job_id, lock=True)
        assert row is not None
        with pytest.raises(IllegalTransition):
            jobs.delete_job(s, row)
        jobs.set_state(s, row, "failed", "", allowed={"starting"})
        with pytest.raises(DriverExiting):
            jobs.delete_job(s, row)
        attempts.end_attempt(s, attempts.list_attempts(s, job_id)[0], "it exited")
        jobs.delete_job(s, row)
    with store.read() as s:
        assert s.query(JobRow).count() == s.query(EventRow).count() == 0
        assert attempts.list_attempts(s, job_id) == []


def test_an_attempt_is_known_by_its_token_which_is_not_kept(store: Store) -> None:
    with store.begin() as s:
        row = new_job(s)
        first, old = attempts.begin_attempt(s, row)
        second, token = attempts.begin_attempt(s, row)
        assert (first.submission_id, second.submission_id) == (f"sapo-{row.id}-1", f"sapo-{row.id}-2")
        s.refresh(first)
        assert (first.state, first.reason, second.state) == ("ended", "superseded", "launching")
        assert row.attempt == 2
    with store.begin() as s:
        found = attempts.by_token(s, token)
        assert found is not None
        assert found.number == 2
        assert attempts.by_token(s, "sapo_job_guess") is None
        renewed = attempts.renew_token(s, found)
        assert attempts.by_token(s, token) is None
        assert attempts.by_token(s, renewed) is not None
        columns = [str(value) for value in s.execute(text("SELECT * FROM attempts")).fetchall()]
        assert not any(old in column or renewed in column for column in columns)
