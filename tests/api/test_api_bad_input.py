"""What is wrong with a request is said in one shape: which part, which value, what would be right."""

from __future__ import annotations

import pytest
from api_parts import QUICKSTART, Connect, problem, submitted
from starlette.testclient import TestClient

from sapo_ray.control.store import Store

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"spec": ', "line 1 column 10"),
        (b'{"spec": {"preset": "quickstart"}} x', "Extra data"),
        (b"", "line 1 column 1"),
        (b'{"spec": NaN}', "NaN is not JSON"),
        (b'{"spec": {}, "priority": Infinity}', "Infinity is not JSON"),
        (b'{"spec": {}, "spec": {}}', "'spec' stands twice"),
        (b'{"spec": {"steps": 99999999999999999999}}', "beyond 2^53"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"spec": "\xff"}', "not valid UTF-8 at byte 10 (0xff)"),
        ('{"spec": "ü"}'.encode("utf-16"), "not valid UTF-8"),
    ],
)
def test_a_body_that_is_not_json_is_400_and_says_where(admin: TestClient, body: bytes, said: str) -> None:
    answer = admin.post("/v1/jobs", content=body, headers=JSON)
    assert said in problem(answer, 400, "malformed_json")["detail"]


@pytest.mark.parametrize("text", ["a\\u0000b", "\\ud800"])
def test_text_that_no_database_can_keep_is_400(admin: TestClient, text: str) -> None:
    body = f'{{"spec": {{"preset": "quickstart"}}, "labels": {{"a": "{text}"}}}}'
    problem(admin.post("/v1/jobs", content=body.encode(), headers=JSON), 400, "invalid_text")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_kind_is_415(admin: TestClient, kind: str) -> None:
    answer = admin.post("/v1/jobs", content=b"{}", headers={"Content-Type": kind})
    assert "application/json" in problem(answer, 415, "unsupported_media_type")["detail"]


def test_an_unknown_key_of_the_job_is_422_with_what_was_meant(admin: TestClient) -> None:
    spec = {"preset": "quickstart", "rollout": {"worker": 2}}
    found = problem(admin.post("/v1/jobs", json={"spec": spec}), 422, "invalid_job")
    assert found["param"] == "rollout.worker"
    assert "did you mean rollout.workers?" in found["detail"]


def test_all_problems_of_a_job_are_listed_each_with_its_key(admin: TestClient) -> None:
    spec = {"preset": "quickstart", "stepz": 3, "learner": {"lr": "fast"}, "data": {"train": [{"path": 7}]}}
    found = problem(admin.post("/v1/jobs", json={"spec": spec}), 422, "invalid_job")
    assert {one["param"] for one in found["errors"]} == {"stepz", "learner.lr", "data.train.0.path"}
    assert "3 problems" in found["detail"]


@pytest.mark.parametrize(
    ("key", "value"), [("steps", "many"), ("steps", 0), ("steps", True), ("steps", None), ("model", []), ("seed", -1)]
)
def test_a_wrong_type_or_value_names_the_key_and_the_value(admin: TestClient, key: str, value: object) -> None:
    found = problem(admin.post("/v1/jobs", json={"spec": {"preset": "quickstart", key: value}}), 422, "invalid_job")
    assert found["param"] == key
    shown = {None: "null", True: "True"}.get(value) if isinstance(value, bool | None) else str(value)
    assert str(shown) in found["detail"]


def test_keys_that_do_not_fit_together_are_422(admin: TestClient) -> None:
    spec = {"preset": "quickstart", "learner": {"mini_batches": 1000}}
    found = problem(admin.post("/v1/jobs", json={"spec": spec}), 422, "invalid_job")
    assert found["param"] == "learner.mini_batches"


@pytest.mark.parametrize("steps", [10**9 + 1, 2**52])
def test_a_number_that_would_not_fit_into_the_store_is_422(admin: TestClient, steps: int) -> None:
    found = problem(admin.post("/v1/jobs", json={"spec": {"preset": "quickstart", "steps": steps}}), 422, "invalid_job")
    assert found["param"] == "steps"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "spec", "spec is missing"),
        ([], None, "dictionary"),
        ({"spec": {"preset": "quickstart"}, "priorty": 1}, "priorty", "did you mean priority?"),
        ({"spec": {"preset": "quickstart"}, "priority": 101}, "priority", "101"),
        ({"spec": {"preset": "quickstart"}, "priority": True}, "priority", "whole number"),
        ({"spec": {"preset": "quickstart"}, "priority": "50"}, "priority", "whole number"),
        ({"spec": {"preset": "quickstart"}, "labels": {"bad key": "x"}}, "labels.bad key", "pattern"),
        ({"spec": {"preset": "quickstart"}, "labels": {"a": 1}}, "labels.a", "string"),
        ({"spec": {"preset": "quickstart"}, "labels": {str(n): "x" for n in range(33)}}, "labels", "32"),
        ({"spec": "preset: quickstart"}, "spec", "dictionary"),
    ],
)
def test_a_request_around_the_job_is_checked_too(admin: TestClient, body: object, param: str | None, said: str) -> None:
    found = problem(admin.post("/v1/jobs", json=body), 422, "invalid_request")
    assert found.get("param") == param
    assert said in found["detail"]


def test_an_unknown_parameter_is_refused_so_that_a_misspelt_dry_run_submits_nothing(admin: TestClient) -> None:
    found = problem(admin.post("/v1/jobs?dryrun=true", json=QUICKSTART), 422, "invalid_request")
    assert "did you mean dry_run?" in found["detail"]
    assert admin.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=501", "limit"),
        ("state=asleep", "state.0"),
        ("label==x", "label"),
    ],
)
def test_a_wrong_parameter_is_422(admin: TestClient, query: str, param: str) -> None:
    assert problem(admin.get(f"/v1/jobs?{query}"), 422, "invalid_request")["param"] == param


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/datasets"])
@pytest.mark.parametrize("cursor", ["x", "", "job-", "bnVsbA", "job-2gd4q7x3zkmbw6tfh5y%00"])
def test_a_bad_cursor_is_400(admin: TestClient, path: str, cursor: str) -> None:
    assert problem(admin.get(f"{path}?after={cursor}"), 400, "bad_cursor")["param"] == "after"


@pytest.mark.parametrize("cursor", ["x", "", "bWV0cmljcw", "c2FtcGxlcy5qc29ubDow"])
def test_a_cursor_of_another_list_is_400(admin: TestClient, cursor: str) -> None:
    job_id = submitted(admin)
    problem(admin.get(f"/v1/jobs/{job_id}/metrics?after={cursor}"), 400, "bad_cursor")


@pytest.mark.parametrize("job_id", ["job-1", "x", "%00", "..", "job-" + "a" * 5000, "job-2GD4Q7X3ZKMBW6TFH5YE", "ü"])
def test_what_cannot_be_a_job_is_404(admin: TestClient, job_id: str) -> None:
    problem(admin.get(f"/v1/jobs/{job_id}"), 404, "not_found")


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/jobs", "/v1/jobs/", "/v1/jobs/a/b/c", "/docs", "/redoc"])
def test_an_unknown_address_is_404(admin: TestClient, path: str) -> None:
    problem(admin.get(path), 404, "not_found")


def test_a_wrong_method_is_405_and_all_right_ones_are_named(admin: TestClient) -> None:
    answer = admin.post("/v1/jobs/job-2gd4q7x3zkmbw6tfh5ye/scale")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET, PUT"
    assert admin.get("/v1/jobs/job-2gd4q7x3zkmbw6tfh5ye:cancel").status_code == 405


def test_a_body_beyond_the_limit_is_413_whether_announced_or_not(connect: Connect) -> None:
    client = connect(max_body_bytes=1000)
    announced = client.post("/v1/jobs", content=b"x" * 1001, headers=JSON)
    assert problem(announced, 413, "too_large")["limit"] == 1000
    came = client.post("/v1/jobs", content=iter([b"x" * 600, b"x" * 600]), headers=JSON)
    problem(came, 413, "too_large")
    problem(client.post("/v1/jobs", content=iter([b'{"spec": 1}']), headers=JSON), 422, "invalid_request")


def test_a_bug_is_500_with_the_request_id_and_without_a_traceback(
    admin: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapo_ray.control.store import jobs

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("/secret/place")

    monkeypatch.setattr(jobs, "list_jobs", broken)
    answer = admin.get("/v1/jobs", headers={"X-Request-ID": "mine-1"})
    found = problem(answer, 500, "internal")
    assert found["request_id"] == "mine-1"
    assert "secret" not in answer.text
    assert "ZeroDivision" not in answer.text


@pytest.mark.parametrize("given", ["with space", "x" * 129, "a\tb", "<script>"])
def test_a_request_id_that_could_not_stand_in_a_log_is_replaced(admin: TestClient, given: str) -> None:
    assert admin.get("/healthz", headers={"X-Request-ID": given}).headers["X-Request-ID"].startswith("req-")


def test_bad_input_leaves_nothing_behind(admin: TestClient, store: Store) -> None:
    for body in (b"{", b'{"spec": {"steps": 1}}', b'{"spec": {"preset": "quickstart", "run_dir": "/x"}}'):
        assert admin.post("/v1/jobs", content=body, headers=JSON | {"Idempotency-Key": "k"}).status_code >= 400
    assert admin.get("/v1/jobs").json()["data"] == []
    assert admin.post("/v1/jobs", json=QUICKSTART, headers={"Idempotency-Key": "k"}).status_code == 201


def test_a_job_nested_too_deep_is_400_and_one_at_the_bound_is_read(admin: TestClient) -> None:
    def nested(levels: int) -> bytes:
        return b'{"spec": {"a": ' + b'{"a": ' * levels + b"1" + b"}" * levels + b"}}"

    for levels in (63, 300, 900):
        answer = admin.post("/v1/jobs", content=nested(levels), headers=JSON)
        assert "deeper than 64" in problem(answer, 400, "malformed_json")["detail"]
    problem(admin.post("/v1/jobs", content=nested(62), headers=JSON), 422, "invalid_job")


def test_a_number_that_no_float_can_hold_is_400(admin: TestClient) -> None:
    answer = admin.post("/v1/jobs", content=b'{"spec": {"learner": {"lr": 1e400}}}', headers=JSON)
    assert "1.8e308" in problem(answer, 400, "malformed_json")["detail"]


def test_of_60000_unknown_keys_50_are_listed_and_the_rest_is_counted(admin: TestClient) -> None:
    spec = {"preset": "quickstart", **{f"stepz{number}": 1 for number in range(60_000)}}
    answer = admin.post("/v1/jobs", json={"spec": spec})
    found = problem(answer, 422, "invalid_job")
    assert len(found["errors"]) == 51
    assert "did you mean steps?" in found["errors"][19]["detail"]
    assert "did you mean" not in found["errors"][20]["detail"]
    assert found["errors"][50]["detail"].startswith("59950 more problems")
    assert "more than 50 problems" in found["detail"]
    beside = problem(admin.post("/v1/jobs", json=spec), 422, "invalid_request")
    assert len(beside["errors"]) == 51
    assert beside["errors"][50]["detail"].startswith("59952 more problems")  # of 60002: `spec` is missing, too
    assert len(answer.content) < 20_000
