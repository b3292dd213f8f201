"""The service itself: health, metrics, logs, faults beneath it, and its own description."""

from __future__ import annotations

import io
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from api_parts import QUICKSTART, Connect, deliver, problem, started, submitted
from api_server import ADMIN_KEY, PLAIN, FakeCluster
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from sapo_ray.control import logs, uploads
from sapo_ray.control.reference import render
from sapo_ray.control.routes.jobs import Submission
from sapo_ray.control.store import Store

HEAVY = ("ray", "torch", "vllm", "deepspeed", "numpy", "transformers", "pyarrow")


def test_the_application_loads_without_anything_that_computes() -> None:
    program = (
        "import sys, sapo_ray.control.app, sapo_ray.control.reference; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_readiness_tells_which_dependency_is_down_and_health_looks_at_none(
    connect: Connect, cluster: FakeCluster, tmp_path: Path
) -> None:
    def look() -> tuple[int, Any]:
        client = connect()  # a new application has not looked yet
        assert client.get("/healthz").json() == {"status": "ok"}
        answer = client.get("/readyz", headers={"Authorization": ""})
        return answer.status_code, answer.json()

    up = {"database": "ok", "disk": "ok", "cluster": "ok"}
    assert look() == (200, {"status": "ready", "checks": up})
    cluster.down = True
    assert look() == (200, {"status": "degraded", "checks": up | {"cluster": "down"}})
    cluster.down = False
    client = connect()
    (tmp_path / "control.db").rename(tmp_path / "gone.db")
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (
        503,
        {"status": "not_ready", "checks": up | {"database": "down"}},
    )
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("fault", ["full", "not there", "hangs"])
def test_a_disk_that_is_full_or_away_leaves_the_service_to_the_drivers_that_hold_for_it(
    fault: str, connect: Connect, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, freed = connect(min_free_gb=1e9 if fault == "full" else 0), threading.Event()
    job_id = submitted(client)
    token = started(store, job_id)
    if fault == "not there":
        (tmp_path / "data").rename(tmp_path / "away")
    if fault == "hangs":
        monkeypatch.setattr("sapo_ray.control.disk.shutil.disk_usage", lambda _: freed.wait(120))
    try:
        answer = client.get("/readyz", timeout=60)
        checks = {"database": "ok", "disk": "down", "cluster": "ok"}
        assert (answer.status_code, answer.json()) == (200, {"status": "degraded", "checks": checks})
        assert deliver(client, job_id, token, 1).status_code == 200
        told = text_string_to_metric_families(client.get("/metrics").text)
        assert {one.name: one.samples[0].value for one in told if one.name == "sapo_disk_up"} == {"sapo_disk_up": 0}
    finally:
        freed.set()


def test_a_disk_that_hangs_is_asked_by_one_thread_and_not_waited_for(
    admin: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed, entered = threading.Event(), threading.Semaphore(0)

    def hang(_: object) -> None:
        entered.release()
        freed.wait(120)

    monkeypatch.setattr("sapo_ray.control.disk.shutil.disk_usage", hang)
    try:
        for path in ("/readyz", "/metrics", "/readyz", "/metrics"):
            began = time.monotonic()
            assert admin.get(path).status_code == 200
            assert time.monotonic() - began < 3 * 2, "two seconds are promised, and a probe has ten"
        assert entered.acquire(timeout=0)
        assert not entered.acquire(timeout=0)
    finally:
        freed.set()


def test_without_the_database_everything_is_503_and_afterwards_everything_is_there(
    acme: TestClient, store: Store, tmp_path: Path
) -> None:
    job_id = submitted(acme)
    token = started(store, job_id)
    (tmp_path / "control.db").rename(tmp_path / "gone.db")
    for answer in (
        acme.get("/v1/jobs"),
        acme.get(f"/v1/jobs/{job_id}"),
        acme.post("/v1/jobs", json=QUICKSTART, headers={"Idempotency-Key": "again"}),
        acme.post(f"/v1/jobs/{job_id}:cancel"),
        acme.post("/v1/datasets?name=a.jsonl", content=b"{}\n", headers={"Content-Type": "application/jsonl"}),
        acme.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}),
        deliver(acme, job_id, token, 1, {"kind": "phase"}),
    ):
        problem(answer, 503, "unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
    (tmp_path / "gone.db").rename(tmp_path / "control.db")
    assert [job["id"] for job in acme.get("/v1/jobs").json()["data"]] == [job_id]
    assert deliver(acme, job_id, token, 1, {"kind": "phase"}).json()["next_seq"] == 2
    made = acme.post("/v1/jobs", json=QUICKSTART, headers={"Idempotency-Key": "again"})
    assert made.status_code == 201
    assert "Idempotent-Replayed" not in made.headers


def test_jobs_are_accepted_while_the_cluster_is_gone(acme: TestClient, cluster: FakeCluster) -> None:
    cluster.down = True
    assert acme.get(f"/v1/jobs/{submitted(acme)}").json()["status"]["state"] == "queued"


def test_metrics_count_requests_by_route_and_jobs_by_state_and_follow_live_jobs(
    admin: TestClient, acme: TestClient, store: Store
) -> None:
    job_id = submitted(acme)
    submitted(acme)
    token = started(store, job_id)
    metrics = {
        "reward/mean": 0.5,
        "age/sample_mean": 1.5,
        "verifier/error_rate": 0.25,
        "rollout/tokens_per_second": 9.0,
    }
    deliver(
        acme, job_id, token, 1,
        {"kind": "transition", "state": "running"}, {"kind": "step", "step": 3, "steps": 60, "metrics": metrics},
    )  # fmt: skip
    acme.get("/v1/jobs/job-2gd4q7x3zkmbw6tfh5ye")
    answer = admin.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}

    def value(name: str, **labels: str) -> float:
        return next(
            one.value for family in families.values() for one in family.samples
            if one.name == name and labels.items() <= one.labels.items()
        )  # fmt: skip

    assert value("sapo_jobs", state="queued") == 1
    assert value("sapo_jobs", state="running") == 1
    assert value("sapo_jobs", state="failed") == 0
    assert value("sapo_link_events_total") == 2
    assert value("sapo_http_request_seconds_count", route="/v1/jobs", method="POST", status="201") == 2
    assert value("sapo_http_request_seconds_count", route="/v1/jobs/{job_id}", status="404") == 1
    assert value("sapo_job_reward", job=job_id, tenant="acme") == 0.5
    assert value("sapo_job_staleness", job=job_id) == 1.5
    assert value("sapo_job_verifier_error_rate", job=job_id) == 0.25
    assert value("sapo_job_tokens_per_second", job=job_id) == 9.0
    assert value("sapo_job_step", job=job_id) == 3
    assert 0 <= value("sapo_driver_lag_seconds", job=job_id) < 60
    assert value("sapo_queue_wait_seconds_count") == 1
    assert value("sapo_store_up") == 1


def test_metrics_have_a_port_of_their_own_if_the_operator_gives_one(connect: Connect) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    submitted(connect(metrics_port=port))
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", **PLAIN)
    assert 'sapo_jobs{ended="no",state="queued"} 1.0' in answer.text


def test_metrics_without_the_database_say_so(admin: TestClient, tmp_path: Path) -> None:
    admin.get("/v1/models")
    (tmp_path / "control.db").rename(tmp_path / "gone.db")
    assert "sapo_store_up 0.0" in admin.get("/metrics").text


@pytest.fixture
def written() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The service's log lines; the process's logging is as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure("debug")
    stream = io.StringIO()
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    for name in ("uvicorn.access", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_a_line_per_request_holds_ids_and_no_key(
    written: Callable[[], list[dict[str, Any]]], admin: TestClient
) -> None:
    job_id = submitted(admin)
    made = admin.post("/v1/api-keys", json={"name": "n"}).json()
    admin.get(f"/v1/jobs/{job_id}", headers={"X-Request-ID": "r-1", "Authorization": f"Bearer {made['secret']}"})
    admin.get("/v1/jobs", headers={"Authorization": "Bearer sapo_a-key-that-nobody-has-made"})
    lines = written()
    [line] = [line for line in lines if line.get("request_id") == "r-1" and line["event"] == "request"]
    assert (line["job_id"], line["route"], line["status"]) == (job_id, "/v1/jobs/{job_id}", 200)
    assert (line["tenant"], line["key"], line["level"]) == ("default", made["id"], "info")
    everything = json.dumps(lines)
    for secret in (ADMIN_KEY, made["secret"], "a-key-that-nobody-has-made"):
        assert secret not in everything


def test_a_bug_is_logged_with_its_traceback_and_without_values(
    written: Callable[[], list[dict[str, Any]]], admin: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapo_ray.control.store import jobs

    def broken(*_: object, **__: object) -> None:
        password = "hunter2-in-a-local-variable"
        raise ValueError(f"bad url postgresql://me:{password[:7]}@host/db with Bearer abc.def and {ADMIN_KEY}")

    monkeypatch.setattr(jobs, "list_jobs", broken)
    admin.get("/v1/jobs", headers={"X-Request-ID": "r-2"})
    [line] = [line for line in written() if line["event"] == "unhandled"]
    assert line["request_id"] == "r-2"
    assert "ValueError" in line["exception"]
    for secret in ("hunter2", "abc.def", ADMIN_KEY):
        assert secret not in json.dumps(line)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"Authorization": "Bearer x"}, {"Authorization": "[hidden]"}),
        ({"headers": {"authorization": "x", "accept": "y"}}, {"headers": {"authorization": "[hidden]", "accept": "y"}}),
        ({"api_key": "x", "token": "y", "tokens": 7}, {"api_key": "[hidden]", "token": "[hidden]", "tokens": 7}),
        ({"text": ["see sapo_job_abcdefghijklmnop now"]}, {"text": ["see [hidden] now"]}),
        ({"url": "postgresql://u:p@h/d"}, {"url": "postgresql://[hidden]@h/d"}),
        ({"text": "sapo_ray.control and sapo_jobs"}, {"text": "sapo_ray.control and sapo_jobs"}),
    ],
)
def test_secrets_are_hidden_wherever_they_stand(event: dict[str, Any], expected: dict[str, Any]) -> None:
    assert logs.hide(event) == expected


def described(node: Any, path: str = "") -> Iterator[str]:
    """Places in schemas that lack a description."""
    for name, one in node.get("properties", {}).items():
        if not one.get("description") and "$ref" not in one:
            yield f"{path}.{name}"


def test_the_document_describes_every_operation_parameter_field_and_error(admin: TestClient) -> None:
    document = admin.get("/openapi.json").json()
    missing: list[str] = []
    ids = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            ids.add(operation["operationId"])
            missing += [where] if not (operation.get("summary") and operation.get("description")) else []
            missing += [
                f"{where} {one['name']}" for one in operation.get("parameters", []) if not one.get("description")
            ]
            public = path in ("/healthz", "/readyz")
            assert public or operation.get("security"), where
            wanted = {"429", "500", "503"} if public else {"401", "429", "500", "503"}
            assert wanted <= set(operation["responses"]), where
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and path != "/readyz":
                    assert list(answer["content"]) == ["application/problem+json"], (where, status)
    assert len(ids) == sum(len(operations) for operations in document["paths"].values())
    # The job's own parts are described by jobs.md's source, where sections speak for themselves.
    for name, schema in document["components"]["schemas"].items():
        if not name.endswith("Spec") and name != "JobSpecInput":
            missing += list(described(schema, name))
    assert missing == []


def test_examples_of_bodies_are_valid(admin: TestClient) -> None:
    document = admin.get("/openapi.json").json()
    examples = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        TypeAdapter(Submission).validate_python(example["value"])
        assert admin.post("/v1/jobs?dry_run=true", json=example["value"]).status_code == 200
    job_id = submitted(admin)
    for method, path in (("patch", "/v1/jobs/{job_id}"), ("put", "/v1/jobs/{job_id}/scale"), ("post", "/v1/api-keys")):
        body = document["paths"][path][method]["requestBody"]["content"]["application/json"]
        for example in body["examples"].values():
            answer = admin.request(method, path.replace("{job_id}", job_id), json=example["value"])
            assert answer.status_code in (200, 201), answer.text


def test_the_reference_page_is_that_of_the_routes(admin: TestClient) -> None:
    page = Path(__file__).parents[2] / "docs" / "api.md"
    assert page.read_text() == render(admin.get("/openapi.json").json()), "run `make docs`"


def test_a_cluster_that_hangs_holds_up_neither_readiness_nor_drivers_nor_users(
    admin: TestClient, store: Store, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submitted(admin)
    token = started(store, job_id)
    freed, entered = threading.Event(), threading.Semaphore(0)

    def hang(*_: object) -> str:
        entered.release()
        assert freed.wait(60)
        return "printed"

    monkeypatch.setattr(cluster, "ping", hang)
    monkeypatch.setattr(cluster, "logs", hang)
    with ThreadPoolExecutor(100) as pool:
        try:
            probes = [pool.submit(admin.get, "/readyz") for _ in range(45)]
            reads = [pool.submit(admin.get, f"/v1/jobs/{job_id}/logs/driver-1") for _ in range(45)]
            for _ in range(5):  # one look, four reads
                assert entered.acquire(timeout=30)
            assert pool.submit(deliver, admin, job_id, token, 1).result(20).status_code == 200
            assert pool.submit(admin.get, "/v1/jobs").result(20).status_code == 200
            assert {probe.result(20).json()["checks"]["cluster"] for probe in probes} == {"down"}
        finally:
            freed.set()
        answers = [read.result(60) for read in reads]
    assert [one.text for one in answers if one.status_code == 200] == ["printed"] * 4
    for one in answers:
        if one.status_code != 200:
            assert problem(one, 503, "unavailable")["detail"].startswith("as many reads from the cluster")
            assert one.headers["Retry-After"] == "2"


def test_examinations_of_data_sets_take_two_threads_at_most(admin: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    freed, entered = threading.Event(), threading.Semaphore(0)

    def hang(*_: object) -> uploads.Contents:
        entered.release()
        assert freed.wait(60)
        return uploads.Contents(rows=1, columns=["a"])

    def upload() -> Any:
        return admin.post("/v1/datasets?name=a.jsonl", content=b"{}\n", headers={"Content-Type": "application/jsonl"})

    monkeypatch.setattr("sapo_ray.control.routes.datasets.examine", hang)
    with ThreadPoolExecutor(2) as pool:
        try:
            two = [pool.submit(upload) for _ in range(2)]
            for _ in range(2):
                assert entered.acquire(timeout=30)
            assert upload().headers["Retry-After"] == "2"
        finally:
            freed.set()
        assert [one.result(60).status_code for one in two] == [201, 201]
