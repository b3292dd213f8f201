"""Jobs over the API: submitted once, listed by pages, changed by those who know the newest state. On both databases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from api_parts import QUICKSTART, Connect, brought_to, problem, run_dir, started, submitted
from starlette.testclient import TestClient

from sapo_ray.config.load import resolve
from sapo_ray.control.store import Store, attempts, idempotency


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_submitted_job_is_queued_with_every_key_resolved(acme: TestClient) -> None:
    answer = acme.post("/v1/jobs", json=QUICKSTART | {"priority": 70, "labels": {"team": "maths"}})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert answer.headers["ETag"] == '"g1"'
    assert (job["tenant"], job["priority"], job["labels"]) == ("acme", 70, {"team": "maths"})
    assert (job["status"]["state"], job["status"]["position"], job["status"]["attempt"]) == ("queued", 1, 0)
    assert job["desired"] == {"state": "run", "discard": False, "scale": {"min": 1, "max": 2, "target": 2}}
    assert job["spec"] == resolve({"preset": "quickstart"}).model_dump(mode="json")
    assert acme.get(answer.headers["Location"]).json() == job


def test_a_dry_run_shows_the_resolved_job_and_makes_none(acme: TestClient) -> None:
    answer = acme.post("/v1/jobs?dry_run=true", json=QUICKSTART, headers={"Idempotency-Key": "dry"})
    assert answer.status_code == 200
    assert answer.json()["valid"] is True
    assert answer.json()["spec"]["steps"] == 60
    assert acme.get("/v1/jobs").json()["data"] == []
    assert acme.post("/v1/jobs", json=QUICKSTART, headers={"Idempotency-Key": "dry"}).status_code == 201


def test_the_same_idempotency_key_gives_the_first_answer_again(acme: TestClient) -> None:
    key = {"Idempotency-Key": "once"}
    first = acme.post("/v1/jobs", json=QUICKSTART, headers=key)
    again = acme.post(
        "/v1/jobs",
        content=b'{"priority": 50,  "spec": {"preset": "quickstart"}}',
        headers=key | {"Content-Type": "application/json"},
    )
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (again.headers["ETag"], again.headers["Location"]) == (first.headers["ETag"], first.headers["Location"])
    assert len(acme.get("/v1/jobs").json()["data"]) == 1


def test_the_same_idempotency_key_with_another_request_is_422(acme: TestClient) -> None:
    key = {"Idempotency-Key": "once"}
    job_id = acme.post("/v1/jobs", json=QUICKSTART, headers=key).json()["id"]
    other = acme.post("/v1/jobs", json=QUICKSTART | {"priority": 51}, headers=key)
    assert problem(other, 422, "key_reused")["param"] == "Idempotency-Key"
    problem(acme.post(f"/v1/jobs/{job_id}:pause", headers=key), 422, "key_reused")
    assert len(acme.get("/v1/jobs").json()["data"]) == 1


def test_a_request_whose_first_try_is_under_way_is_409_and_told_to_wait(acme: TestClient, store: Store) -> None:
    from sapo_ray.control.body import digest

    content = QUICKSTART | {"priority": 50, "labels": {}}
    with store.begin() as session:
        idempotency.claim(session, "acme", "busy", "POST", "/v1/jobs", digest("POST", "/v1/jobs", content))
    answer = acme.post("/v1/jobs", json=QUICKSTART, headers={"Idempotency-Key": "busy"})
    problem(answer, 409, "in_flight")
    assert int(answer.headers["Retry-After"]) >= 1


def test_one_key_sent_by_twenty_clients_at_once_makes_one_job(acme: TestClient) -> None:
    together = threading.Barrier(20)

    def submit(_: int) -> tuple[int, str]:
        together.wait(30)
        answer = acme.post("/v1/jobs", json=QUICKSTART, headers={"Idempotency-Key": "crowd"})
        return answer.status_code, answer.json()["id"]

    with ThreadPoolExecutor(20) as pool:
        answers = set(pool.map(submit, range(20)))
    assert len(answers) == 1
    assert len(acme.get("/v1/jobs").json()["data"]) == 1


def test_idempotency_keys_of_tenants_do_not_meet(acme: TestClient, rival: TestClient) -> None:
    key = {"Idempotency-Key": "same"}
    first = acme.post("/v1/jobs", json=QUICKSTART, headers=key).json()
    second = rival.post("/v1/jobs", json=QUICKSTART, headers=key).json()
    assert (first["tenant"], second["tenant"]) == ("acme", "rival")
    assert first["id"] != second["id"]


def test_an_accepted_job_is_answered_alike_even_if_it_would_not_be_accepted_now(acme: TestClient) -> None:
    data = acme.post(
        "/v1/datasets?name=a.jsonl",
        content=b'{"question": "1", "answer": "2"}\n',
        headers={"Content-Type": "application/jsonl"},
    ).json()
    body = {"spec": {"preset": "quickstart", "data": {"train": [{"path": f"dataset:{data['id']}"}]}}}
    first = acme.post("/v1/jobs", json=body, headers={"Idempotency-Key": "kept"})
    assert first.status_code == 201
    acme.post(f"/v1/jobs/{first.json()['id']}:cancel")
    assert acme.delete(f"/v1/datasets/{data['id']}").status_code == 204
    assert acme.post("/v1/jobs", json=body, headers={"Idempotency-Key": "kept"}).json() == first.json()
    problem(acme.post("/v1/jobs", json=body, headers={"Idempotency-Key": "new"}), 403, "not_allowed")


def test_pages_hold_every_job_once_newest_first_while_jobs_are_added(acme: TestClient) -> None:
    expected = [submitted(acme) for _ in range(7)][::-1]
    seen: list[str] = []
    after = None
    while True:
        page = acme.get("/v1/jobs", params={"limit": 3} | ({"after": after} if after else {})).json()
        seen += [job["id"] for job in page["data"]]
        submitted(acme)
        if not page["has_more"]:
            break
        after = page["next"]
    assert page["next"] is None
    assert seen == expected


def test_jobs_are_found_by_state_and_label_and_know_their_place_in_the_queue(acme: TestClient, store: Store) -> None:
    low, high = submitted(acme, priority=10), submitted(acme, priority=90, labels={"team/x": "a=b"})
    paused = submitted(acme)
    brought_to(store, paused, "paused")
    positions = {job["id"]: job["status"]["position"] for job in acme.get("/v1/jobs").json()["data"]}
    assert positions == {low: 2, high: 1, paused: None}

    def ids(query: str) -> list[str]:
        return [job["id"] for job in acme.get(f"/v1/jobs?{query}").json()["data"]]

    assert ids("state=paused") == [paused]
    assert ids("state=paused&state=queued") == [paused, high, low]
    assert ids("label=team/x%3Da%3Db") == [high]
    assert ids("label=team/x") == [high]
    assert ids("label=team/x%3Dc") == []
    assert ids("label=team") == []


def test_a_change_needs_the_newest_etag_if_it_names_one(acme: TestClient) -> None:
    job_id = submitted(acme)
    first = acme.patch(f"/v1/jobs/{job_id}", json={"priority": 80}, headers={"If-Match": '"g1"'})
    assert (first.status_code, first.json()["priority"], first.headers["ETag"]) == (200, 80, '"g2"')
    stale = {"If-Match": '"g1"'}
    for answer in (
        acme.patch(f"/v1/jobs/{job_id}", json={"priority": 1}, headers=stale),
        acme.put(f"/v1/jobs/{job_id}/scale", json={"min": 1, "max": 1, "target": 1}, headers=stale),
        acme.post(f"/v1/jobs/{job_id}:cancel", headers=stale),
        acme.delete(f"/v1/jobs/{job_id}", headers=stale),
    ):
        problem(answer, 412, "stale_etag")
        assert answer.headers["ETag"] == '"g2"'
    assert acme.get(f"/v1/jobs/{job_id}").json()["priority"] == 80
    for tags in ("*", '"g7", "g2"'):
        assert acme.patch(f"/v1/jobs/{job_id}", json={}, headers={"If-Match": tags}).status_code == 200


def test_only_what_is_given_changes(acme: TestClient) -> None:
    job_id = submitted(acme, labels={"a": "1", "b": "2"})
    changed = acme.patch(f"/v1/jobs/{job_id}", json={"labels": {"c": "3"}}).json()
    assert (changed["labels"], changed["priority"], changed["name"]) == ({"c": "3"}, 50, "quickstart")
    same = acme.patch(f"/v1/jobs/{job_id}", json={})
    assert same.headers["ETag"] == '"g2"'


def test_deleting_removes_job_events_and_files_and_only_when_the_job_has_ended(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    folder = run_dir(store, job_id)
    (folder / "metrics.jsonl").write_text("{}\n")
    assert problem(acme.delete(f"/v1/jobs/{job_id}"), 409, "illegal_transition")["state"] == "queued"
    assert folder.exists()
    acme.post(f"/v1/jobs/{job_id}:cancel")
    assert acme.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert not folder.exists()
    problem(acme.get(f"/v1/jobs/{job_id}"), 404, "not_found")
    problem(acme.delete(f"/v1/jobs/{job_id}"), 404, "not_found")
    assert acme.get("/v1/jobs").json()["data"] == []


def test_a_submission_beyond_the_queue_of_a_tenant_is_refused_until_there_is_room(connect: Connect) -> None:
    client = connect(max_queued_per_tenant=2)
    first, _ = submitted(client), submitted(client)
    found = problem(client.post("/v1/jobs", json=QUICKSTART), 409, "quota_exceeded")
    assert found["detail"] == "2 jobs of this tenant are queued, of at most 2"
    client.post(f"/v1/jobs/{first}:cancel")
    submitted(client)


def test_a_job_whose_driver_is_still_exiting_is_not_deleted_yet(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    folder = run_dir(store, job_id)
    started(store, job_id)
    brought_to(store, job_id, "succeeded")
    answer = acme.delete(f"/v1/jobs/{job_id}")
    found = problem(answer, 409, "illegal_transition")
    assert found["detail"] == "the job is succeeded, and its driver is still exiting"
    assert answer.headers["Retry-After"] == "3"
    assert folder.exists()
    with store.begin() as session:
        [attempt] = attempts.list_attempts(session, job_id)
        attempts.end_attempt(session, attempt, "it exited")
    assert acme.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert not folder.exists()


def test_a_job_that_is_not_deleted_after_all_keeps_its_files(
    acme: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.orm import Session

    job_id = submitted(acme)
    brought_to(store, job_id, "failed")
    folder = run_dir(store, job_id)
    (folder / "journal.jsonl").write_text("{}\n")
    with monkeypatch.context() as patch:

        def gone(*_: object) -> None:
            raise OperationalError("COMMIT", {}, Exception("database is locked"))

        patch.setattr(Session, "commit", gone)
        assert acme.delete(f"/v1/jobs/{job_id}").status_code >= 500
    assert (folder / "journal.jsonl").exists()
    assert acme.get(f"/v1/jobs/{job_id}").status_code == 200


def test_the_config_is_a_job_file_that_gives_the_same_job(acme: TestClient, tmp_path: Path) -> None:
    job_id = submitted(acme)
    stored = acme.get(f"/v1/jobs/{job_id}").json()["spec"]
    assert acme.get(f"/v1/jobs/{job_id}/config").json() == stored
    answer = acme.get(f"/v1/jobs/{job_id}/config", headers={"Accept": "application/yaml"})
    assert answer.headers["content-type"] == "application/yaml"
    assert resolve(yaml.safe_load(answer.text)).model_dump(mode="json") == stored
    assert acme.get(f"/v1/jobs/{job_id}/config?format=yaml").text == answer.text


def test_many_submissions_at_once_are_all_there(holder: Callable[..., TestClient]) -> None:
    client = holder("crowd")
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: submitted(client), range(64)))
    listed = [job["id"] for job in client.get("/v1/jobs?limit=100").json()["data"]]
    assert sorted(listed) == sorted(made)
    assert len(set(made)) == 64
