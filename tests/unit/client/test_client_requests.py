"""What the client asks, asks again, and says when it is refused."""

from __future__ import annotations

import pickle
import socket
import time
from pathlib import Path

import pytest
from scripted_service import JOB_ID, Answer, Service, job, problem, reply

from sapo_ray import client as api
from sapo_ray.client import Client
from sapo_ray.errors import ConfigError

JOBS = "POST /v1/jobs"
ONE = f"GET /v1/jobs/{JOB_ID}"
BUSY = problem(503, "unavailable", "the job store is busy", {"retry-after": "0"})


def test_a_submission_that_meets_a_busy_service_is_made_again_under_the_same_key(
    service: Service, client: Client
) -> None:
    service.on(JOBS, BUSY, Answer(502, {}, [b"<html>bad gateway</html>"]), reply(job("queued"), 201))
    found = client.jobs.submit({"preset": "quickstart"}, priority=70, labels={"team": "a"})
    assert found.id == JOB_ID
    asked = service.asked(JOBS)
    assert len(asked) == 3
    assert len({one.headers["idempotency-key"] for one in asked}) == 1
    assert len(asked[0].headers["idempotency-key"]) == 32
    assert asked[2].json == {"spec": {"preset": "quickstart"}, "priority": 70, "labels": {"team": "a"}}
    assert asked[2].headers["authorization"] == "Bearer sapo_" + "k" * 43


def test_an_answer_that_breaks_off_is_asked_for_again(service: Service, client: Client) -> None:
    broken = Answer(201, {"content-type": "application/json"}, [b'{"id": "job-'], drop=True)
    service.on(JOBS, broken, reply(job("queued"), 201))
    assert client.jobs.submit({"preset": "quickstart"}).status.state == "queued"
    assert len({one.headers["idempotency-key"] for one in service.asked(JOBS)}) == 1


def test_the_same_key_still_at_work_is_waited_for(service: Service, client: Client) -> None:
    service.on(JOBS, problem(409, "in_flight", "still at work", {"retry-after": "0"}), reply(job("queued"), 201))
    assert client.jobs.submit({}, idempotency_key="mine").id == JOB_ID
    assert [one.headers["idempotency-key"] for one in service.asked(JOBS)] == ["mine", "mine"]


def test_retry_after_is_the_least_that_is_waited(service: Service, client: Client) -> None:
    service.on(ONE, problem(429, "rate_limited", "slower", {"retry-after": "1"}), reply(job()))
    began = time.monotonic()
    client.jobs.get(JOB_ID)
    assert time.monotonic() - began >= 1.0


def test_a_service_that_asks_for_more_patience_than_two_minutes_is_an_error_at_once(
    service: Service, client: Client
) -> None:
    service.on(ONE, problem(503, "unavailable", "maintenance", {"retry-after": "3600"}))
    with pytest.raises(api.Unavailable, match="maintenance") as caught:
        client.jobs.get(JOB_ID)
    assert caught.value.retry_after == 3600.0
    assert len(service.requests) == 1


def test_tries_are_bounded(service: Service, client: Client) -> None:
    service.on(ONE, BUSY)
    with pytest.raises(api.Unavailable):
        client.jobs.get(JOB_ID)
    assert len(service.requests) == 6


def test_what_may_have_been_done_is_not_done_again_without_a_key(service: Service, client: Client) -> None:
    service.on("POST /v1/api-keys", BUSY)
    with pytest.raises(api.Unavailable):
        client.keys.create("laptop")
    service.on(f"PATCH /v1/jobs/{JOB_ID}", Answer(200, {}, [b"{"], drop=True))
    with pytest.raises(api.ConnectionFailed, match=f"broke off during PATCH /v1/jobs/{JOB_ID}"):
        client.jobs.update(JOB_ID, priority=1)
    assert len(service.requests) == 2


def test_a_delete_whose_first_answer_was_lost_is_done(service: Service, client: Client) -> None:
    where = f"DELETE /v1/jobs/{JOB_ID}"
    service.on(where, Answer(200, {"content-length": "5"}, [b"x"], drop=True), problem(404, "not_found", "no such job"))
    client.jobs.delete(JOB_ID)
    assert len(service.asked(where)) == 2
    with pytest.raises(api.NotFound):
        client.jobs.delete(JOB_ID)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, api.Invalid),
        (401, api.Unauthorized),
        (403, api.Forbidden),
        (404, api.NotFound),
        (409, api.Conflict),
        (412, api.Conflict),
        (413, api.Invalid),
        (422, api.Invalid),
        (500, api.ApiError),
    ],
)
def test_a_refusal_is_an_error_of_its_kind_and_not_asked_again(
    status: int, kind: type[api.ApiError], service: Service, client: Client
) -> None:
    extra = {"hint": "do this", "param": "steps", "request_id": "req-1"}
    service.on(ONE, problem(status, "some_code", "it is so", **extra))
    with pytest.raises(kind) as caught:
        client.jobs.get(JOB_ID)
    error = caught.value
    assert type(error) is kind
    assert str(error) == f"it is so; do this ({ONE}: {status} some_code, request req-1)"
    assert (error.status, error.code, error.param, error.hint) == (status, "some_code", "steps", "do this")
    assert len(service.requests) == 1
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.request_id) == (kind, str(error), "req-1")


def test_all_problems_of_a_job_are_listed(service: Service, client: Client) -> None:
    errors = [{"param": "steps", "detail": "steps must be >= 1, got 0"}, {"detail": "stepz is not a key"}]
    service.on(JOBS, problem(422, "invalid_job", "the job has 2 problems", errors=errors))
    with pytest.raises(api.Invalid) as caught:
        client.jobs.submit({"steps": 0, "stepz": 1})
    lines = str(caught.value).splitlines()
    assert lines[0] == "the job has 2 problems"
    assert lines[1] == "  - steps: steps must be >= 1, got 0"
    assert lines[2].startswith("  - stepz is not a key")


def test_nobody_listening_is_said_in_one_line_with_the_way_out() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with Client(url, "key") as client, pytest.raises(api.ConnectionFailed) as caught:
            client.ready()
    message = str(caught.value)
    assert message.startswith(f"no service at {url} (")
    assert "sapo-ray serve" in message
    assert "\n" not in message


def test_another_service_at_the_address_is_recognised(service: Service, client: Client) -> None:
    service.on(ONE, Answer(200, {"content-type": "text/html"}, [b"<html>hello</html>"]))
    with pytest.raises(api.BadReply, match="text/html in place of JSON; is SAPO_URL"):
        client.jobs.get(JOB_ID)
    service.on(ONE, reply({"id": "job-1"}))
    with pytest.raises(api.BadReply, match="a Job that this client cannot read"):
        client.jobs.get(JOB_ID)


def test_an_answer_that_drips_is_given_up_after_the_timeout(service: Service) -> None:
    service.on("GET /readyz", Answer(200, {}, [b" "] * 100, pause_s=0.1))
    began = time.monotonic()
    with (
        Client(service.url, "key", timeout=0.5) as client,
        pytest.raises(api.ConnectionFailed, match="not whole after"),
    ):
        client.ready()
    assert time.monotonic() - began < 3.0


def test_without_a_key_nothing_is_sent_but_readiness_is_told(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAPO_API_KEY", raising=False)
    service.on("GET /readyz", reply({"status": "ready"}))
    with Client(service.url) as client:
        assert client.ready() == {"status": "ready"}
        with pytest.raises(ConfigError, match="set SAPO_API_KEY"):
            client.jobs.get(JOB_ID)
    assert "authorization" not in service.requests[0].headers
    assert len(service.requests) == 1


def test_address_and_key_come_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPO_URL", service.url + "/")
    monkeypatch.setenv("SAPO_API_KEY", "sapo_pasted\n")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    service.on(ONE, reply(job()))
    with Client() as client:
        client.jobs.get(JOB_ID)
    assert service.requests[0].headers["authorization"] == "Bearer sapo_pasted"


@pytest.mark.parametrize("url", ["localhost:8800", "ftp://here", "http://", "http://[::1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="SAPO_URL"):
        Client(url, "key")


def test_a_key_with_characters_that_no_key_has_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        Client("http://localhost:1", "sapo_\u201csecret\u201d")
    assert "secret" not in str(caught.value)


def test_fields_of_a_newer_service_are_passed_over(service: Service, client: Client) -> None:
    service.on(ONE, reply(job() | {"colour": "green"}))
    assert client.jobs.get(JOB_ID).name == "quickstart"


def test_a_list_is_fetched_by_pages_as_far_as_it_is_asked_for(service: Service, client: Client) -> None:
    where = "GET /v1/jobs"
    pages = [
        {"data": [job(), job()], "has_more": True, "next": "c1"},
        {"data": [job()], "has_more": True, "next": "c2"},
    ]
    service.on(where, *map(reply, pages), reply({"data": [job()], "has_more": False, "next": None}))
    found = client.jobs.list(state="running", label="team=a", page_size=2)
    assert service.requests == []
    assert len([next(found), next(found)]) == 2
    assert [one.query for one in service.asked(where)] == ["state=running&label=team%3Da&limit=2"]
    assert len(list(found)) == 2
    assert service.asked(where)[2].query == "state=running&label=team%3Da&limit=2&after=c2"


def test_a_list_of_two_asks_for_no_more_than_two(service: Service, client: Client) -> None:
    service.on("GET /v1/jobs", reply({"data": [job()] * 5, "has_more": True, "next": "c"}))
    assert len(list(client.jobs.list(limit=2))) == 2
    assert [one.query for one in service.requests] == ["limit=2"]


def test_a_cursor_that_leads_nowhere_does_not_go_on_for_ever(service: Service, client: Client) -> None:
    service.on("GET /v1/jobs", reply({"data": [job()], "has_more": True, "next": "same"}))
    with pytest.raises(api.BadReply, match="not where"):
        list(client.jobs.list())


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"target": 3}, {"min": 1, "max": 4, "target": 3}),
        ({"target": 8}, {"min": 1, "max": 8, "target": 8}),
        ({"min": 3}, {"min": 3, "max": 4, "target": 3}),
        ({"max": 1}, {"min": 1, "max": 1, "target": 1}),
        ({"target": 8, "max": 6}, {"min": 1, "max": 6, "target": 8}),
        ({"target": 5, "min": 5, "max": 9}, {"min": 5, "max": 9, "target": 5}),
    ],
)
def test_bounds_that_are_not_given_move_with_the_target(
    asked: dict[str, int], sent: dict[str, int], service: Service, client: Client
) -> None:
    where = f"/v1/jobs/{JOB_ID}/scale"
    service.on(f"GET {where}", reply({"min": 1, "max": 4, "target": 2}))
    service.on(f"PUT {where}", lambda request: reply(request.json))
    assert client.jobs.scale(JOB_ID, **asked).model_dump(exclude_none=True) == sent


def test_scaling_undoes_nothing_that_somebody_else_changed_meanwhile(service: Service, client: Client) -> None:
    where = f"/v1/jobs/{JOB_ID}/scale"
    before, after = {"min": 1, "max": 4, "target": 2}, {"min": 2, "max": 6, "target": 2}
    service.on(f"GET {where}", reply(before, etag='"g3"'), reply(after, etag='"g4"'))
    service.on(
        f"PUT {where}", problem(412, "stale_etag", "it changed"), lambda request: reply(request.json, etag='"g5"')
    )
    assert client.jobs.scale(JOB_ID, 3).model_dump(exclude_none=True) == {"min": 2, "max": 6, "target": 3}
    assert [one.headers["if-match"] for one in service.asked(f"PUT {where}")] == ['"g3"', '"g4"']


def test_scaling_a_job_that_others_change_all_the_time_gives_up(service: Service, client: Client) -> None:
    where = f"/v1/jobs/{JOB_ID}/scale"
    service.on(f"GET {where}", reply({"min": 1, "max": 4, "target": 2}, etag='"g3"'))
    service.on(f"PUT {where}", problem(412, "stale_etag", "it changed"))
    with pytest.raises(api.Conflict, match="it changed"):
        client.jobs.scale(JOB_ID, 3)
    assert len(service.asked(f"PUT {where}")) == 5


def test_a_change_that_stands_on_a_generation_says_so(service: Service, client: Client) -> None:
    where = f"PATCH /v1/jobs/{JOB_ID}"
    service.on(where, problem(412, "stale_etag", "it changed"))
    with pytest.raises(api.Conflict):
        client.jobs.update(JOB_ID, labels={}, if_match=3)
    assert service.asked(where)[0].headers["if-match"] == '"g3"'
    assert service.asked(where)[0].json == {"labels": {}}


def test_a_job_may_be_a_file_and_is_only_read_here(service: Service, client: Client, tmp_path: Path) -> None:
    service.on(JOBS, reply(job("queued"), 201))
    path = tmp_path / "job.yaml"
    path.write_text("preset: of-tomorrow\nlearner: {lr: 1e-6}\n")
    client.jobs.submit(path)
    assert service.requests[0].json["spec"] == {"preset": "of-tomorrow", "learner": {"lr": 1e-6}}
    with pytest.raises(ConfigError, match="no such file"):
        client.jobs.submit(tmp_path / "absent.yaml")
    assert len(service.requests) == 1


def test_an_id_that_would_lead_elsewhere_is_not_asked_for(client: Client, service: Service) -> None:
    with pytest.raises(ConfigError, match="a job id is"):
        client.jobs.get("../api-keys")
    assert service.requests == []
