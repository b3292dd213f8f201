"""Who may do what: keys, scopes, tenants, limits."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from api_parts import QUICKSTART, Connect, problem, submitted
from api_server import ADMIN_KEY
from sqlalchemy import text
from starlette.testclient import TestClient

from sapo_ray.control.access import first_admin_key
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import Store


def test_without_a_key_only_health_readiness_and_the_document_answer(admin: TestClient) -> None:
    document = admin.get("/openapi.json").json()
    stranger = TestClient(admin.app, raise_server_exceptions=False)
    answered = set()
    for path, operations in document["paths"].items():
        filled = path.replace("{job_id}", "job-2gd4q7x3zkmbw6tfh5ye").replace("{attempt}", "1")
        for method in operations:
            answer = stranger.request(method, filled)
            if answer.status_code != 401:
                answered.add(path)
    assert answered == {"/healthz", "/readyz"}
    assert stranger.get("/openapi.json").status_code == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic c2Fwbw==", "Bearer sapo_wrong", f"Bearer {ADMIN_KEY}x", f"bearer  {ADMIN_KEY}y"],
)
def test_a_missing_or_wrong_key_is_401_and_says_how_to_send_one(admin: TestClient, header: str) -> None:
    answer = admin.get("/v1/jobs", headers={"Authorization": header})
    assert "Authorization" in problem(answer, 401, "unauthenticated")["hint"]
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_revoked_key_is_refused_at_once(admin: TestClient) -> None:
    made = admin.post("/v1/api-keys", json={"name": "short-lived", "scopes": ["read"]}).json()
    held = {"Authorization": f"Bearer {made['secret']}"}
    assert admin.get("/v1/jobs", headers=held).status_code == 200
    assert admin.delete(f"/v1/api-keys/{made['id']}").status_code == 204
    problem(admin.get("/v1/jobs", headers=held), 401, "unauthenticated")
    assert admin.delete(f"/v1/api-keys/{made['id']}").status_code == 204


def test_an_expired_key_is_refused(admin: TestClient, store: Store) -> None:
    made = admin.post("/v1/api-keys", json={"name": "soon over", "expires_at": "2099-01-01T00:00:00Z"}).json()
    with store.begin() as session:
        session.execute(text("UPDATE api_keys SET expires_at = :past WHERE id = :id"), {"past": 1.0, "id": made["id"]})
    problem(admin.get("/v1/jobs", headers={"Authorization": f"Bearer {made['secret']}"}), 401, "unauthenticated")


def test_a_key_cannot_be_made_to_expire_in_the_past(admin: TestClient) -> None:
    answer = admin.post("/v1/api-keys", json={"name": "late", "expires_at": "2001-01-01T00:00:00Z"})
    assert problem(answer, 422, "invalid_request")["param"] == "expires_at"


def test_reading_needs_read_changing_needs_submit_and_keys_need_admin(holder: Callable[..., TestClient]) -> None:
    reader, submitter, both = holder("acme", "read"), holder("acme", "submit"), holder("acme", "read", "submit")
    job_id = submitted(both)
    assert reader.get(f"/v1/jobs/{job_id}").status_code == 200
    assert "scope submit" in problem(reader.post("/v1/jobs", json=QUICKSTART), 403, "forbidden")["detail"]
    for change in (":pause", ":resume", ":cancel", ":checkpoint"):
        problem(reader.post(f"/v1/jobs/{job_id}{change}"), 403, "forbidden")
    problem(reader.delete(f"/v1/jobs/{job_id}"), 403, "forbidden")
    problem(reader.patch(f"/v1/jobs/{job_id}", json={"priority": 1}), 403, "forbidden")
    problem(reader.put(f"/v1/jobs/{job_id}/scale", json={"min": 1, "max": 1, "target": 1}), 403, "forbidden")
    problem(reader.post("/v1/datasets", content=b'{"a": 1}\n'), 403, "forbidden")
    problem(submitter.get("/v1/jobs"), 403, "forbidden")
    problem(both.post("/v1/api-keys", json={"name": "more"}), 403, "forbidden")
    problem(both.get("/v1/api-keys"), 403, "forbidden")
    problem(both.get("/metrics"), 403, "forbidden")


def test_another_tenants_job_is_404_like_one_that_never_was(acme: TestClient, rival: TestClient) -> None:
    job_id = submitted(acme)
    never = "job-2gd4q7x3zkmbw6tfh5ye"
    for method, path in [
        ("GET", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("POST", ":pause"),
        ("POST", ":resume"),
        ("POST", ":cancel"),
        ("POST", ":checkpoint"),
        ("GET", "/scale"),
        ("PUT", "/scale"),
        ("GET", "/workers"),
        ("GET", "/diagnosis"),
        ("GET", "/events"),
        ("GET", "/metrics"),
        ("GET", "/samples"),
        ("GET", "/logs"),
        ("GET", "/logs/driver-1"),
        ("GET", "/checkpoints"),
        ("GET", "/checkpoints/step-000001/files/a"),
        ("GET", "/export"),
        ("GET", "/export/files/config.json"),
        ("GET", "/config"),
    ]:
        body = {"PATCH": {"priority": 1}, "PUT": {"min": 1, "max": 1, "target": 1}}.get(method)
        theirs = rival.request(method, f"/v1/jobs/{job_id}{path}", json=body)
        nobodys = rival.request(method, f"/v1/jobs/{never}{path}", json=body)
        assert problem(theirs, 404, "not_found")["detail"].replace(job_id, never) == nobodys.json()["detail"]
    stream = rival.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    problem(stream, 404, "not_found")
    assert rival.get("/v1/jobs").json()["data"] == []


def test_an_admin_of_a_tenant_manages_its_keys_and_no_others(
    admin: TestClient, holder: Callable[..., TestClient]
) -> None:
    boss = holder("acme", "admin")
    made = boss.post("/v1/api-keys", json={"name": "worker"}).json()
    assert made["tenant"] == "acme"
    problem(boss.post("/v1/api-keys", json={"name": "spy", "tenant": "rival"}), 403, "forbidden")
    assert {key["tenant"] for key in boss.get("/v1/api-keys").json()["data"]} == {"acme"}
    operators = next(key for key in admin.get("/v1/api-keys").json()["data"] if key["tenant"] == "default")
    problem(boss.delete(f"/v1/api-keys/{operators['id']}"), 404, "not_found")
    problem(boss.get("/metrics"), 403, "forbidden")
    assert admin.post("/v1/api-keys", json={"name": "rival's", "tenant": "rival"}).json()["tenant"] == "rival"


def test_the_secret_of_a_key_is_shown_once_and_kept_nowhere(admin: TestClient, store: Store) -> None:
    made = admin.post("/v1/api-keys", json={"name": "new"}).json()
    assert made["secret"].startswith("sapo_")
    assert made["secret"] not in admin.get("/v1/api-keys").text
    with store.read() as session:
        rows = session.execute(text("SELECT * FROM api_keys")).all()
    assert made["secret"] not in repr(rows)
    assert ADMIN_KEY not in repr(rows)


def test_the_first_admin_key_is_made_once(store: Store, configure: Callable[..., Settings]) -> None:
    settings = configure(admin_key=None)
    secret = first_admin_key(store, settings)
    assert secret is not None
    assert first_admin_key(store, settings) is None


def test_too_many_requests_of_one_key_are_429_with_the_time_to_wait(connect: Connect) -> None:
    client = connect(rate_per_s=0.1, rate_burst=3)
    for _ in range(3):
        assert client.get("/v1/models").status_code == 200
    answer = client.get("/v1/models")
    problem(answer, 429, "rate_limited")
    assert 1 <= int(answer.headers["Retry-After"]) <= 10
    other = client.get("/v1/models", headers={"Authorization": "Bearer sapo_another"})
    problem(other, 401, "unauthenticated")


def test_guessing_keys_is_slowed_down(connect: Connect) -> None:
    client = connect(rate_per_s=0.1, rate_burst=3)
    answers = [client.get("/v1/jobs", headers={"Authorization": f"Bearer sapo_{n}"}).status_code for n in range(5)]
    assert answers == [401, 401, 401, 429, 429]


def test_a_key_is_usable_again_when_its_bucket_has_filled(connect: Connect) -> None:
    client = connect(rate_per_s=20, rate_burst=1)
    assert client.get("/v1/models").status_code == 200
    deadline = time.monotonic() + 10
    while client.get("/v1/models").status_code != 200:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/link/job-22222222222222222222/1/assignment"])
def test_wrong_tokens_are_limited_before_the_store_is_asked(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    client = connect(rate_per_s=0.01, rate_burst=5)
    assert [client.get("/v1/jobs").status_code for _ in range(4)] == [200] * 4
    asked = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self: (asked.append(1), read(self))[1])
    wrong = {"Authorization": "Bearer sapo_wrong"}
    answers = [client.get(path, headers=wrong) for _ in range(12)]
    assert [one.status_code for one in answers] == [401] * 5 + [429] * 7
    assert len(asked) == 5
    assert int(answers[-1].headers["Retry-After"]) > 0
    assert client.get("/v1/jobs").status_code == 200  # a key that is known does not count
