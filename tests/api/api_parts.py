"""Small builders for tests of the API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from httpx import Response
from starlette.testclient import TestClient

from sapo_ray.control.store import Store, attempts, jobs

Connect = Callable[..., TestClient]
"""Starts the application with changed settings; gives a client with the operator's admin key."""
QUICKSTART = {"spec": {"preset": "quickstart"}}


def submitted(client: TestClient, **changes: Any) -> str:
    """Id of a new job."""
    answer = client.post("/v1/jobs", json=QUICKSTART | changes)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def started(store: Store, job_id: str) -> str:
    """Launch the job as the reconciler does; gives its driver's token."""
    with store.begin() as session:
        row = jobs.get_job(session, None, job_id, lock=True)
        assert row is not None
        _, token = attempts.begin_attempt(session, row)
        jobs.set_state(session, row, "starting", "launching", allowed={"queued", "recovering"})
    return token


def brought_to(store: Store, job_id: str, state: str) -> None:
    """Put the job into any state, as if it had got there."""
    with store.begin() as session:
        row = jobs.get_job(session, None, job_id, lock=True)
        assert row is not None
        jobs.set_state(session, row, state, "by the test", allowed={row.state})


def run_dir(store: Store, job_id: str) -> Path:
    """The job's run directory, made."""
    with store.read() as session:
        row = jobs.get_job(session, None, job_id)
        assert row is not None
        path = Path(row.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    return path


def deliver(
    client: TestClient, job_id: str, token: str, first: int, *events: dict[str, Any], attempt: int = 1
) -> Response:
    """What a driver sends."""
    numbered = [{"time": 1e9, "attempt": attempt, "seq": seq, **event} for seq, event in enumerate(events, first)]
    return client.post(
        f"/v1/link/{job_id}/{attempt}/events",
        json={"first_seq": first, "events": numbered},
        headers={"Authorization": f"Bearer {token}"},
    )


def problem(answer: Response, status: int, code: str) -> dict[str, Any]:
    """The answer's problem document, which must be this one."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    found: dict[str, Any] = json.loads(answer.text)
    assert found["code"] == code, found
    assert found["status"] == status
    assert found["request_id"] == answer.headers["X-Request-ID"]
    assert "Traceback" not in answer.text
    return found
