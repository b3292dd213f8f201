"""Pause, resume, cancel, checkpoint, scale: what is permitted in which state, and what the driver is then told."""

from __future__ import annotations

from typing import get_args

import pytest
from api_parts import QUICKSTART, brought_to, deliver, problem, started, submitted
from starlette.testclient import TestClient

from sapo_ray.api.jobs import State
from sapo_ray.control.store import Store

# State after the request, or 409; None: granted, and nothing changes.
TABLE: dict[str, dict[str, str | int | None]] = {
    "queued": {"pause": "paused", "resume": None, "cancel": "cancelled", "checkpoint": 409},
    "starting": {"pause": "pausing", "resume": 409, "cancel": "cancelling", "checkpoint": 409},
    "running": {"pause": "pausing", "resume": 409, "cancel": "cancelling", "checkpoint": "running"},
    "recovering": {"pause": "pausing", "resume": 409, "cancel": "cancelling", "checkpoint": 409},
    "pausing": {"pause": None, "resume": 409, "cancel": "cancelling", "checkpoint": None},
    "paused": {"pause": None, "resume": "queued", "cancel": "cancelled", "checkpoint": 409},
    "cancelling": {"pause": 409, "resume": 409, "cancel": None, "checkpoint": 409},
    "cancelled": {"pause": 409, "resume": 409, "cancel": None, "checkpoint": 409},
    "succeeded": {"pause": 409, "resume": 409, "cancel": 409, "checkpoint": 409},
    "failed": {"pause": 409, "resume": 409, "cancel": 409, "checkpoint": 409},
}


@pytest.mark.parametrize("state", get_args(State))
def test_every_request_in_every_state(acme: TestClient, store: Store, state: str) -> None:
    for action, expected in TABLE[state].items():
        job_id = submitted(acme)
        if state != "queued":
            brought_to(store, job_id, state)
        answer = acme.post(f"/v1/jobs/{job_id}:{action}")
        if expected == 409:
            found = problem(answer, 409, "illegal_transition")
            assert found["state"] == state
            assert state in found["detail"]
            assert found["hint"]
            assert acme.get(f"/v1/jobs/{job_id}").json()["generation"] == 1
        else:
            assert answer.status_code == 202
            assert answer.headers["Location"] == f"/v1/jobs/{job_id}"
            assert answer.json()["status"]["state"] == (expected or state)
            assert answer.headers["ETag"] == ('"g1"' if expected is None else '"g2"')


@pytest.mark.parametrize("action", ["pause", "cancel"])
def test_the_same_request_twice_is_fine_and_changes_nothing_more(acme: TestClient, action: str) -> None:
    job_id = submitted(acme)
    first = acme.post(f"/v1/jobs/{job_id}:{action}")
    again = acme.post(f"/v1/jobs/{job_id}:{action}")
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert len(acme.get(f"/v1/jobs/{job_id}/events").json()["data"]) == 2


def test_a_repeated_request_with_its_key_asks_for_one_checkpoint(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    before = deliver(acme, job_id, token, 1, {"kind": "transition", "state": "running"}).json()["orders"]
    for _ in range(3):
        assert acme.post(f"/v1/jobs/{job_id}:checkpoint", headers={"Idempotency-Key": "c1"}).status_code == 202
    after = deliver(acme, job_id, token, 2).json()["orders"]
    assert after["checkpoint_request"] == before["checkpoint_request"] + 1


def test_the_driver_hears_what_the_user_wants(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    assert deliver(acme, job_id, token, 1, {"kind": "transition", "state": "running"}).json()["orders"] == {
        "state": "run", "discard": False, "rollout_workers": 2, "rollout_min": 1, "rollout_max": 2,
        "checkpoint_request": 0, "generation": 1,
    }  # fmt: skip
    acme.put(f"/v1/jobs/{job_id}/scale", json={"min": 2, "max": 8, "target": 5})
    scaled = deliver(acme, job_id, token, 2).json()["orders"]
    assert [scaled[name] for name in ("rollout_min", "rollout_max", "rollout_workers")] == [2, 8, 5]
    acme.post(f"/v1/jobs/{job_id}:pause")
    assert deliver(acme, job_id, token, 2).json()["orders"]["state"] == "pause"
    deliver(acme, job_id, token, 2, {"kind": "transition", "state": "paused", "reason": "as asked"})
    assert acme.get(f"/v1/jobs/{job_id}").json()["status"]["state"] == "paused"
    acme.post(f"/v1/jobs/{job_id}:resume")
    job = acme.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"]["state"], job["desired"]["state"]) == ("queued", "run")


def test_cancel_with_discard_reaches_the_driver_and_may_be_added_later(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    acme.post(f"/v1/jobs/{job_id}:cancel")
    assert deliver(acme, job_id, token, 1).json()["orders"] | {"generation": 0} == {
        "state": "cancel", "discard": False, "rollout_workers": 2, "rollout_min": 1, "rollout_max": 2,
        "checkpoint_request": 0, "generation": 0,
    }  # fmt: skip
    assert acme.post(f"/v1/jobs/{job_id}:cancel?discard=true").json()["desired"]["discard"] is True
    assert deliver(acme, job_id, token, 1).json()["orders"]["discard"] is True


def test_scaling_is_bounded_by_itself_and_ends_with_the_job(acme: TestClient) -> None:
    job_id = submitted(acme)
    path = f"/v1/jobs/{job_id}/scale"
    nobody_counts = {"min": 1, "max": 8, "target": 4, "observed": None}
    assert acme.put(path, json={"min": 1, "max": 8, "target": 4}).json() == nobody_counts
    assert acme.get(path).json() == nobody_counts
    assert acme.put(path, json={"min": 1, "max": 8, "target": 4}).headers["ETag"] == '"g2"'
    for wrong, param, says in (
        (
            {"min": 5, "max": 8, "target": 4},
            "target",
            "between min (5) and max (8), got 4; change it, or give another min",
        ),
        (
            {"min": 1, "max": 3, "target": 4},
            "target",
            "between min (1) and max (3), got 4; change it, or give another max",
        ),
        ({"min": 5, "max": 3, "target": 4}, "min", "min must be at most max (3), got 5; lower min or raise max"),
    ):
        refused = problem(acme.put(path, json=wrong), 422, "invalid_request")
        assert refused["param"] == param
        assert says in str(refused)
    for wrong in ({"min": 0, "max": 8, "target": 4}, {"min": 1, "max": 10**6, "target": 4}, {"target": 4}):
        problem(acme.put(path, json=wrong), 422, "invalid_request")
    acme.post(f"/v1/jobs/{job_id}:cancel")
    assert (
        problem(acme.put(path, json={"min": 1, "max": 1, "target": 1}), 409, "illegal_transition")["state"]
        == "cancelled"
    )


def test_scale_shows_what_the_driver_counts_while_there_is_one(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    counted = {"wanted": 3, "ready": 1, "starting": 1, "pending": 1, "draining": 0, "given_up": 0}
    short = {"kind": "condition", "condition": "NoCapacity", "reason": "no room for 1 of 3 rollout workers"}
    running = {"kind": "transition", "state": "running"}
    deliver(acme, job_id, token, 1, running, {"kind": "workers", **counted}, short)
    assert acme.get(f"/v1/jobs/{job_id}/scale").json()["observed"] == counted
    status = acme.get(f"/v1/jobs/{job_id}").json()["status"]
    assert status["summary"]["workers"] == 1
    assert [one["type"] for one in status["conditions"]] == ["NoCapacity"]
    deliver(acme, job_id, token, 4, {"kind": "transition", "state": "interrupted", "reason": "gone"})
    assert acme.get(f"/v1/jobs/{job_id}/scale").json()["observed"] is None
    assert acme.get(f"/v1/jobs/{job_id}").json()["status"]["conditions"] == []


def test_a_job_begins_with_the_bounds_of_its_spec(acme: TestClient) -> None:
    spec = QUICKSTART["spec"] | {"rollout": {"workers": 2, "min_workers": 2, "max_workers": 6}}
    job_id = submitted(acme, spec=spec)
    assert acme.get(f"/v1/jobs/{job_id}/scale").json() == {"min": 2, "max": 6, "target": 2, "observed": None}


def test_workers_are_those_of_the_newest_attempt_as_last_reported(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    deliver(acme, job_id, token, 1, {"kind": "worker", "what": "worker_ready", "worker": "rollout-0", "version": "1.0"})
    brought_to(store, job_id, "recovering")
    token = started(store, job_id)
    deliver(
        acme, job_id, token, 1,
        {"kind": "worker", "what": "worker_ready", "worker": "rollout-1", "version": "2.0"},
        {"kind": "worker", "what": "worker_ready", "worker": "rollout-0", "version": "2.0"},
        {"kind": "worker", "what": "worker_lost", "worker": "rollout-1", "reason": "killed"},
        attempt=2,
    )  # fmt: skip
    found = acme.get(f"/v1/jobs/{job_id}/workers").json()["data"]
    assert [(one["id"], one["state"], one["attempt"], one["details"]) for one in found] == [
        ("rollout-0", "worker_ready", 2, {"version": "2.0"}),
        ("rollout-1", "worker_lost", 2, {"reason": "killed"}),
    ]


def test_of_too_many_reports_about_workers_the_newest_count(
    acme: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapo_ray.control.routes import scale

    monkeypatch.setattr(scale, "MOST_EVENTS", 2)
    job_id = submitted(acme)
    token = started(store, job_id)
    said = [
        {"kind": "worker", "what": what, "worker": "rollout-0"} for what in ("worker_ready",) * 3 + ("worker_lost",)
    ]
    assert deliver(acme, job_id, token, 1, *said).status_code == 200
    [worker] = acme.get(f"/v1/jobs/{job_id}/workers").json()["data"]
    assert worker["state"] == "worker_lost"
