"""What a run wrote, fetched from outside: metrics, samples, logs, checkpoints, export; never a file beside them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from api_parts import brought_to, problem, run_dir, started, submitted
from api_server import FakeCluster
from starlette.testclient import TestClient

from sapo_ray.control.store import Store

WEIGHTS = bytes(range(256)) * 4096


@pytest.fixture
def job_id(acme: TestClient, store: Store) -> str:
    """A job whose run directory holds something of everything."""
    job_id = submitted(acme)
    started(store, job_id)
    folder = run_dir(store, job_id)
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    (folder / "export" / "model.safetensors").write_bytes(WEIGHTS)
    checkpoint = folder / "checkpoints" / "step-000020"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "model" / "w.bin").write_bytes(b"abc")
    files = {"model/w.bin": {"bytes": 3, "blake2b": hashlib.blake2b(b"abc", digest_size=16).hexdigest()}}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "step": 20, "files": files}))
    (folder / "checkpoints" / "latest").write_text("step-000020")
    writing = folder / "checkpoints" / ".writing-step-000040"
    writing.mkdir()
    (writing / "manifest.json").write_text("{}")
    (folder / "logs").mkdir()
    (folder / "logs" / "rollout-0.log").write_text("ready\nwarm\n")
    (folder / ".token-1").write_text("the driver's token")
    rows = [{"step": n, "reward/mean": n / 10, "loss": float("nan") if n == 2 else 1.0} for n in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "rew')
    samples = [{"step": n // 2, "i": n, "completion": "x\u2028y"} for n in range(2, 12)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return job_id


def test_metrics_come_by_step_and_name_and_by_pages(acme: TestClient, job_id: str) -> None:
    path = f"/v1/jobs/{job_id}/metrics"
    rows = acme.get(path).json()["data"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1] == {"step": 2, "reward/mean": 0.2, "loss": None}
    chosen = acme.get(f"{path}?from_step=4&names=reward/mean").json()["data"]
    assert chosen == [{"step": 4, "reward/mean": 0.4}, {"step": 5, "reward/mean": 0.5}]
    first = acme.get(f"{path}?limit=3").json()
    assert (len(first["data"]), first["has_more"]) == (3, True)
    rest = acme.get(f"{path}?limit=3&after={first['next']}").json()
    assert ([row["step"] for row in rest["data"]], rest["has_more"], rest["next"]) == ([4, 5], False, None)


def test_samples_of_a_step_are_found(acme: TestClient, job_id: str) -> None:
    found = acme.get(f"/v1/jobs/{job_id}/samples?step=3").json()["data"]
    assert found == [{"step": 3, "i": 6, "completion": "x\u2028y"}, {"step": 3, "i": 7, "completion": "x\u2028y"}]
    first = acme.get(f"/v1/jobs/{job_id}/samples?step=3&limit=1").json()
    second = acme.get(f"/v1/jobs/{job_id}/samples?step=3&limit=1&after={first['next']}").json()
    assert [row["i"] for row in first["data"] + second["data"]] == [6, 7]


def test_a_job_that_has_not_begun_has_empty_lists(acme: TestClient) -> None:
    fresh = submitted(acme)
    for name in ("metrics", "samples", "logs", "checkpoints", "workers"):
        assert acme.get(f"/v1/jobs/{fresh}/{name}").json() == {"data": [], "has_more": False, "next": None}
    problem(acme.get(f"/v1/jobs/{fresh}/export"), 404, "not_found")


def test_logs_of_all_actors_and_of_the_driver_are_reachable(
    acme: TestClient, job_id: str, cluster: FakeCluster
) -> None:
    cluster.printed[f"sapo-{job_id}-1"] = "driver says ü"
    listed = acme.get(f"/v1/jobs/{job_id}/logs").json()["data"]
    assert [(one["name"], one["bytes"]) for one in listed] == [("rollout-0.log", 11), ("driver-1", None)]
    answer = acme.get(f"/v1/jobs/{job_id}/logs/rollout-0.log?offset=6")
    assert (answer.text, answer.headers["X-Next-Offset"]) == ("warm\n", "11")
    assert acme.get(f"/v1/jobs/{job_id}/logs/rollout-0.log?offset=-5").text == "warm\n"
    assert acme.get(f"/v1/jobs/{job_id}/logs/rollout-0.log?offset=99").text == ""
    assert acme.get(f"/v1/jobs/{job_id}/logs/rollout-0.log?limit=5").text == "ready"
    assert acme.get(f"/v1/jobs/{job_id}/logs/driver-1").text == "driver says ü"
    problem(acme.get(f"/v1/jobs/{job_id}/logs/driver-2"), 404, "not_found")


def test_the_drivers_log_is_503_while_the_cluster_is_gone_and_the_actors_logs_are_not(
    acme: TestClient, job_id: str, cluster: FakeCluster
) -> None:
    cluster.down = True
    answer = acme.get(f"/v1/jobs/{job_id}/logs/driver-1")
    problem(answer, 503, "unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert acme.get(f"/v1/jobs/{job_id}/logs/rollout-0.log").status_code == 200


def test_checkpoints_are_listed_whole_with_their_files(acme: TestClient, job_id: str) -> None:
    [found] = acme.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"]
    assert (found["name"], found["step"], found["latest"], found["bytes"]) == ("step-000020", 20, True, 3)
    [file] = found["files"]
    content = acme.get(f"/v1/jobs/{job_id}/checkpoints/step-000020/files/{file['path']}").content
    assert hashlib.blake2b(content, digest_size=16).hexdigest() == file["blake2b"]


def test_the_export_is_listed_with_checksums_and_fetched_whole(acme: TestClient, job_id: str) -> None:
    listed = acme.get(f"/v1/jobs/{job_id}/export").json()["data"]
    assert [(one["path"], one["bytes"]) for one in listed] == [("config.json", 2), ("model.safetensors", len(WEIGHTS))]
    content = acme.get(f"/v1/jobs/{job_id}/export/files/model.safetensors").content
    assert content == WEIGHTS
    assert listed[1]["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("asked", "status", "content", "said"),
    [
        ("bytes=0-9", 206, WEIGHTS[:10], f"bytes 0-9/{len(WEIGHTS)}"),
        ("bytes=1048570-", 206, WEIGHTS[1048570:], f"bytes 1048570-1048575/{len(WEIGHTS)}"),
        ("bytes=-4", 206, WEIGHTS[-4:], f"bytes 1048572-1048575/{len(WEIGHTS)}"),
        ("bytes=5-99999999", 206, WEIGHTS[5:], f"bytes 5-1048575/{len(WEIGHTS)}"),
        ("bytes=-99999999", 206, WEIGHTS, f"bytes 0-1048575/{len(WEIGHTS)}"),
        ("bytes=0-1,4-5", 200, WEIGHTS, None),
        ("lines=0-1", 200, WEIGHTS, None),
        ("bytes=9-1", 200, WEIGHTS, None),
        ("bytes=-", 200, WEIGHTS, None),
    ],
)
def test_ranges(acme: TestClient, job_id: str, asked: str, status: int, content: bytes, said: str | None) -> None:
    answer = acme.get(f"/v1/jobs/{job_id}/export/files/model.safetensors", headers={"Range": asked})
    assert (answer.status_code, answer.headers.get("content-range")) == (status, said)
    assert answer.content == content
    assert answer.headers["content-length"] == str(len(content))


@pytest.mark.parametrize("asked", ["bytes=1048576-", "bytes=9999999999999999999999-", "bytes=-0"])
def test_a_range_beyond_the_file_is_416_with_the_size(acme: TestClient, job_id: str, asked: str) -> None:
    answer = acme.get(f"/v1/jobs/{job_id}/export/files/model.safetensors", headers={"Range": asked})
    problem(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */1048576"


def test_a_download_that_is_resumed_after_the_file_changed_gets_all_of_the_new_one(
    acme: TestClient, job_id: str, store: Store
) -> None:
    path = f"/v1/jobs/{job_id}/export/files/model.safetensors"
    tag = acme.get(path).headers["ETag"]
    resumed = {"Range": "bytes=10-", "If-Range": tag}
    assert acme.get(path, headers=resumed).status_code == 206
    file = run_dir(store, job_id) / "export" / "model.safetensors"
    file.write_bytes(b"new" * 100)
    os.utime(file, ns=(1, 1))
    answer = acme.get(path, headers=resumed)
    assert (answer.status_code, answer.content) == (200, b"new" * 100)


@pytest.mark.parametrize(
    "path",
    [
        "export/files/../.token-1",
        "export/files/..%2f.token-1",
        "export/files/%2e%2e/.token-1",
        "export/files/%2fetc%2fpasswd",
        "export/files//etc/passwd",
        "export/files/.",
        "export/files/",
        "export/files/config.json%00",
        "export/files/config.json/",
        "export/files/config.json/x",
        "logs/..%2f.token-1",
        "logs/..%2fmetrics.jsonl",
        "checkpoints/..%2f/files/.token-1",
        "checkpoints/../files/metrics.jsonl",
        "checkpoints/.writing-step-000040/files/manifest.json",
        "checkpoints/%2e%2e/files/metrics.jsonl",
        "export/files/" + "a" * 3000,
    ],
)
def test_nothing_outside_is_served(acme: TestClient, job_id: str, path: str) -> None:
    answer = acme.get(f"/v1/jobs/{job_id}/{path}")
    assert answer.status_code in (404, 405)
    assert "token" not in answer.text.replace(".token-1", "")


def test_no_link_is_followed_not_even_on_the_way(acme: TestClient, job_id: str, store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("classified")
    folder = run_dir(store, job_id)
    (folder / "export" / "file-link").symlink_to(secret / "key")
    (folder / "export" / "folder-link").symlink_to(secret)
    (folder / "logs" / "x.log").symlink_to(secret / "key")
    os.mkfifo(folder / "logs" / "pipe.log")
    for path in ("export/files/file-link", "export/files/folder-link/key", "logs/x.log", "logs/pipe.log"):
        problem(acme.get(f"/v1/jobs/{job_id}/{path}"), 404, "not_found")
    assert "link" not in acme.get(f"/v1/jobs/{job_id}/export").text
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(secret / "key")
    assert acme.get(f"/v1/jobs/{job_id}/metrics").json()["data"] == []
    (folder / "export").rename(folder / "moved")
    (folder / "export").symlink_to(secret)
    problem(acme.get(f"/v1/jobs/{job_id}/export"), 404, "not_found")
    problem(acme.get(f"/v1/jobs/{job_id}/export/files/key"), 404, "not_found")


def test_a_damaged_manifest_hides_its_checkpoint_only(acme: TestClient, job_id: str, store: Store) -> None:
    damaged = run_dir(store, job_id) / "checkpoints" / "step-000030"
    damaged.mkdir()
    (damaged / "manifest.json").write_text('{"step": ')
    listed = acme.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"]
    assert [one["name"] for one in listed] == ["step-000020"]


def test_files_stay_reachable_when_the_job_has_ended(acme: TestClient, job_id: str, store: Store) -> None:
    brought_to(store, job_id, "succeeded")
    assert acme.get(f"/v1/jobs/{job_id}/export/files/config.json").content == b"{}"
