"""The drivers' side: each event once, in order, by the holder of the attempt's token alone. On both databases."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from api_parts import QUICKSTART, Connect, brought_to, deliver, problem, run_dir, started, submitted
from httpx import Response
from starlette.testclient import TestClient

from sapo_ray.control.store import Store

STEP = {"kind": "step", "step": 1, "steps": 60, "drops": {}, "metrics": {"reward/mean": 0.5}}
JSON = {"Content-Type": "application/json"}


def assignment(client: TestClient, job_id: str, token: str, attempt: int = 1) -> Response:
    """What the driver is given."""
    return client.get(f"/v1/link/{job_id}/{attempt}/assignment", headers={"Authorization": f"Bearer {token}"})


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_events_arrive_once_however_often_they_are_sent(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    events = [{"kind": "transition", "state": "running"}, STEP, {"kind": "phase", "phase": "train"}]
    assert deliver(acme, job_id, token, 1, *events).json()["next_seq"] == 4
    assert deliver(acme, job_id, token, 1, *events).json()["next_seq"] == 4
    assert deliver(acme, job_id, token, 2, *events[1:], {"kind": "phase", "phase": "x"}).json()["next_seq"] == 5
    found = acme.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert [event["id"] for event in found] == list(range(1, len(found) + 1))
    driver = [event["kind"] for event in found if event["source"] == "driver"]
    assert driver == ["transition", "step", "phase", "phase"]
    job = acme.get(f"/v1/jobs/{job_id}").json()["status"]
    assert (job["state"], job["step"], job["summary"]["reward"]) == ("running", 1, 0.5)
    assert job["last_heard"] is not None


def test_a_gap_is_409_and_says_what_comes_next_and_nothing_is_stored(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    deliver(acme, job_id, token, 1, STEP)
    before = acme.get(f"/v1/jobs/{job_id}/events").json()
    assert problem(deliver(acme, job_id, token, 5, STEP), 409, "sequence_gap")["expected"] == 2
    assert acme.get(f"/v1/jobs/{job_id}/events").json() == before


def test_a_superseded_driver_is_told_to_end_and_reports_nothing(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    old = started(store, job_id)
    brought_to(store, job_id, "recovering")
    started(store, job_id)
    found = problem(deliver(acme, job_id, old, 1, STEP), 409, "superseded")
    assert found["current_attempt"] == 2
    answer = acme.get(f"/v1/link/{job_id}/1/assignment", headers={"Authorization": f"Bearer {old}"})
    problem(answer, 409, "superseded")
    assert acme.get(f"/v1/jobs/{job_id}").json()["status"]["step"] == 0


def test_a_token_is_for_its_own_job_and_attempt(acme: TestClient, store: Store) -> None:
    one, two = submitted(acme), submitted(acme)
    token, other = started(store, one), started(store, two)
    problem(deliver(acme, two, token, 1, STEP), 401, "unauthenticated")
    problem(deliver(acme, one, token, 1, STEP, attempt=2), 401, "unauthenticated")
    problem(deliver(acme, one, "sapo_job_wrong", 1, STEP), 401, "unauthenticated")
    problem(
        acme.get(f"/v1/link/{one}/1/assignment", headers={"Authorization": f"Bearer {other}"}), 401, "unauthenticated"
    )
    problem(acme.get(f"/v1/link/{one}/1/assignment"), 401, "unauthenticated")
    problem(acme.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"}), 401, "unauthenticated")


def test_an_empty_delivery_is_a_sign_of_life(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    before = acme.get(f"/v1/jobs/{job_id}").json()["status"]["last_heard"]
    assert deliver(acme, job_id, token, 1).json()["next_seq"] == 1
    assert before is None
    assert acme.get(f"/v1/jobs/{job_id}").json()["status"]["last_heard"] is not None


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"first_seq": 1, "events": [', 400, "malformed_json"),
        (b"[]", 422, "invalid_request"),
        (b'{"first_seq": 0, "events": []}', 422, "invalid_request"),
        (b'{"first_seq": 1}', 422, "invalid_request"),
        (b'{"first_seq": 1, "events": [7]}', 422, "invalid_request"),
        (b'{"first_seq": 1, "events": [{"seq": 2, "kind": "x"}]}', 422, "invalid_request"),
        (b'{"first_seq": 1, "events": [' + b'{"kind": "x"},' * 500 + b'{"kind": "x"}]}', 422, "invalid_request"),
    ],
)
def test_a_wrong_delivery_is_refused_and_stores_nothing(
    acme: TestClient, store: Store, body: bytes, status: int, code: str
) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    headers = JSON | {"Authorization": f"Bearer {token}"}
    problem(acme.post(f"/v1/link/{job_id}/1/events", content=body, headers=headers), status, code)
    assert deliver(acme, job_id, token, 1).json()["next_seq"] == 1


def test_odd_values_in_an_event_do_not_stop_the_events_after_it(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    body = (
        b'{"first_seq": 1, "events": [{"time": "never", "kind": "step", "metrics": {"x": NaN, "y": 1e999}, '
        b'"text": "\\u0000 \\ud800 \xff"}, {"time": 1, "kind": "phase"}]}'
    )
    headers = JSON | {"Authorization": f"Bearer {token}"}
    answer = acme.post(f"/v1/link/{job_id}/1/events", content=body, headers=headers)
    assert (answer.status_code, answer.json()["next_seq"]) == (200, 3)
    found = acme.get(f"/v1/jobs/{job_id}/events?kind=step").json()["data"]
    assert found[0]["data"]["metrics"] == {"x": None, "y": None}


def test_a_delivery_beyond_the_limit_is_413(connect: Connect, store: Store) -> None:
    client = connect(max_link_bytes=1000)
    job_id = submitted(client)
    token = started(store, job_id)
    problem(deliver(client, job_id, token, 1, {"kind": "x", "text": "y" * 1000}), 413, "too_large")


def keep(folder: Path, tenant: str, name: str, value: str) -> None:
    """A secret, as an operator keeps it."""
    (folder / tenant).mkdir(parents=True, exist_ok=True)
    (folder / tenant / name).write_text(value)


def test_the_assignment_holds_the_job_its_folder_and_the_secrets_that_the_job_names(
    connect: Connect, store: Store, tmp_path: Path
) -> None:
    for tenant, name, value in [
        ("default", "WANDB_API_KEY", "w-123\n"), ("default", "HF_TOKEN", "h-456"), ("rival", "OTHER", "hidden")
    ]:  # fmt: skip
        keep(tmp_path / "secrets", tenant, name, value)
    client = connect(secrets_dir=tmp_path / "secrets")
    job_id = submitted(client, spec=QUICKSTART["spec"] | {"secrets": ["WANDB_API_KEY"]})
    answer = assignment(client, job_id, started(store, job_id)).json()
    assert answer["secrets"] == {"WANDB_API_KEY": "w-123"}
    assert (answer["job_id"], answer["attempt"], answer["run_dir"]) == (job_id, 1, str(run_dir(store, job_id)))
    assert answer["spec"] == client.get(f"/v1/jobs/{job_id}").json()["spec"]
    assert answer["orders"]["state"] == "run"
    for path in ("", "/events", "/config"):
        assert "w-123" not in client.get(f"/v1/jobs/{job_id}{path}").text
    plain = submitted(client)
    assert assignment(client, plain, started(store, plain)).json()["secrets"] == {}


def test_a_job_whose_secret_was_taken_away_fails_with_the_reason_before_it_has_learned_anything(
    connect: Connect, store: Store, tmp_path: Path
) -> None:
    keep(tmp_path / "secrets", "default", "HF_TOKEN", "h-456")
    client = connect(secrets_dir=tmp_path / "secrets")
    job_id = submitted(client, spec=QUICKSTART["spec"] | {"secrets": ["HF_TOKEN"]})
    (tmp_path / "secrets" / "default" / "HF_TOKEN").unlink()
    token = started(store, job_id)
    said = problem(assignment(client, job_id, token), 409, "superseded")["detail"]
    status = client.get(f"/v1/jobs/{job_id}").json()["status"]
    assert (status["state"], status["reason"]) == ("failed", said)
    assert "secrets.0 'HF_TOKEN': this tenant has no such secret" in said
    assert [one["data"]["state"] for one in client.get(f"/v1/jobs/{job_id}/events?kind=transition").json()["data"]] == [
        "queued", "starting", "failed",
    ]  # fmt: skip


def test_a_driver_asks_again_while_the_storage_of_secrets_does_not_answer(
    connect: Connect, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "secrets", "default", "HF_TOKEN", "h-456")
    client = connect(secrets_dir=tmp_path / "secrets")
    job_id = submitted(client, spec=QUICKSTART["spec"] | {"secrets": ["HF_TOKEN"]})
    token = started(store, job_id)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "scandir", fails)
        problem(assignment(client, job_id, token), 503, "unavailable")
    assert client.get(f"/v1/jobs/{job_id}").json()["status"]["state"] == "starting"
    assert assignment(client, job_id, token).json()["secrets"] == {"HF_TOKEN": "h-456"}


def test_a_job_that_has_learned_something_is_paused_and_goes_on_once_its_secret_is_back(
    connect: Connect, store: Store, tmp_path: Path
) -> None:
    keep(tmp_path / "secrets", "default", "HF_TOKEN", "h-456")
    client = connect(secrets_dir=tmp_path / "secrets")
    job_id = submitted(client, spec=QUICKSTART["spec"] | {"secrets": ["HF_TOKEN"]})
    deliver(client, job_id, started(store, job_id), 1, {"kind": "transition", "state": "running"}, STEP)
    brought_to(store, job_id, "recovering")
    (tmp_path / "secrets" / "default" / "HF_TOKEN").unlink()
    problem(assignment(client, job_id, started(store, job_id), 2), 409, "superseded")
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"]["state"], job["desired"]["state"]) == ("paused", "pause")
    assert "resume it" in job["status"]["reason"]
    keep(tmp_path / "secrets", "default", "HF_TOKEN", "h-789")
    assert client.post(f"/v1/jobs/{job_id}:resume").json()["status"]["state"] == "queued"
    assert assignment(client, job_id, started(store, job_id), 3).json()["secrets"] == {"HF_TOKEN": "h-789"}


def test_own_code_that_was_accepted_for_one_tenant_is_not_launched_beside_a_second_one(
    connect: Connect, store: Store
) -> None:
    client = connect(allow_rewards=["*"])
    job_id = submitted(client, spec=QUICKSTART["spec"] | {"verifier": {"reward": "rewards:score"}})
    assert client.post("/v1/api-keys", json={"name": "k", "tenant": "rival"}).status_code == 201
    problem(assignment(client, job_id, started(store, job_id)), 409, "superseded")
    status = client.get(f"/v1/jobs/{job_id}").json()["status"]
    assert status["state"] == "failed"
    assert "several tenants share a cluster" in status["reason"]


def test_a_job_that_is_being_cancelled_stays_so_though_it_may_not_be_launched(connect: Connect, store: Store) -> None:
    client = connect(allow_rewards=["*"])
    job_id = submitted(client, spec=QUICKSTART["spec"] | {"verifier": {"reward": "rewards:score"}})
    client.post("/v1/api-keys", json={"name": "k", "tenant": "rival"})
    token = started(store, job_id)
    client.post(f"/v1/jobs/{job_id}:cancel")
    problem(assignment(client, job_id, token), 409, "superseded")
    assert client.get(f"/v1/jobs/{job_id}").json()["status"]["state"] == "cancelling"


def test_an_event_nested_too_deep_is_stored_shortened_and_the_next_one_follows(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    headers = {"Authorization": f"Bearer {token}"} | JSON
    for seq, levels in ((1, 400), (2, 5000)):
        inner = b"[" * levels + b'"]}\\"{["' + b"]" * levels
        body = b'{"first_seq": %d, "events": [{"seq": %d, "kind": "x", "odd": %s, "r": "]"}]}' % (seq, seq, inner)
        answer = acme.post(f"/v1/link/{job_id}/1/events", content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["next_seq"] == seq + 1
    assert deliver(acme, job_id, token, 3, STEP).json()["next_seq"] == 4
    for event in acme.get(f"/v1/jobs/{job_id}/events?kind=x").json()["data"]:
        odd, depth = event["data"]["odd"], 0
        while isinstance(odd, list):
            odd, depth = odd[0], depth + 1
        assert (odd, depth, event["data"]["r"]) == ("(nested too deep)", 61, "]")


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_whole_number_of_many_digits_stops_no_driver(acme: TestClient, store: Store, digits: int) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    event = '{"time": %s, "kind": "step", "step": %s, "metrics": {"reward/mean": %s}}' % (("9" * digits,) * 3)
    body = f'{{"first_seq": 1, "events": [{event}]}}'.encode()
    headers = {"Authorization": f"Bearer {token}"} | JSON
    answer = acme.post(f"/v1/link/{job_id}/1/events", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    status = acme.get(f"/v1/jobs/{job_id}").json()["status"]
    assert (status["step"], status["summary"].get("reward")) == (0, None)
    assert acme.get(f"/v1/jobs/{job_id}/events?kind=step").status_code == 200
