"""The launcher against a real Ray: Jobs API, a head that is gone and back, a service that ends or is killed."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from kube_world import JOB, kube_world, request

from sapo_ray.control.embedded import TOKEN, EmbeddedRay
from sapo_ray.control.embedded_processes import Record, processes_of
from sapo_ray.control.kube import KubeClient, KubeClusters
from sapo_ray.control.kube.identity import Identity
from sapo_ray.control.kube.making import Options
from sapo_ray.control.launcher import LauncherUnavailable, LaunchRequest, LaunchStatus, NotStarted, RayJobs
from sapo_ray.control.settings import load_settings
from sapo_ray.doctor import CHECKS
from sapo_ray.doctor import cluster as doctor_cluster

pytestmark = pytest.mark.integration

NEVER = threading.Event()
SECRET, NAME = "s" * 64, f"sapo-{JOB}-1"


def python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def until(what: str, condition: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.2)


def ended(jobs: RayJobs, id: str) -> LaunchStatus:
    until(f"the end of {id}", lambda: jobs.status(id).over)
    return jobs.status(id)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRay]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / TOKEN).write_text(Identity(service="sapo", secret=SECRET).token(NAME))
    (folder / TOKEN).chmod(0o600)
    cluster = EmbeddedRay(folder)
    cluster.start(NEVER)
    yield cluster
    cluster.end()


@pytest.fixture
def jobs(cluster: EmbeddedRay) -> Iterator[RayJobs]:
    with RayJobs(cluster.url, python=sys.executable, token=cluster.token) as jobs:
        yield jobs


def test_a_submission_runs_to_its_end_and_its_output_can_be_read(jobs: RayJobs) -> None:
    assert jobs.status("sapo-good-1").state == "UNKNOWN"
    assert jobs.logs("sapo-good-1") == ""
    jobs.submit_command("sapo-good-1", python("print('Grüße', 6 * 7)"))
    assert ended(jobs, "sapo-good-1").state == "SUCCEEDED"
    assert "Grüße 42" in jobs.logs("sapo-good-1")


def test_the_doctor_looks_at_the_nodes_from_within(cluster: EmbeddedRay, tmp_path: Path) -> None:
    """The whole way: a marker on storage, a job on the head, a task on each node, a sum, and everything away again."""
    settings = load_settings(
        data_dir=tmp_path,
        ray_jobs_url=cluster.url,
        ray_auth_token=cluster.token,
        driver_python=sys.executable,
        control_url=cluster.url + "/nothing",
    )
    found = list(doctor_cluster.look(settings, CHECKS))
    told = {(one.check, one.where.split()[0]): one for one in found}
    assert ("shm", "node") in told, found
    assert told.pop(("shm", "node")).status in ("ok", "warning")  # as the machine has it
    assert {place: one.status for place, one in told.items()} == {
        ("versions", "head"): "ok",
        ("dns", "head"): "failed",  # nobody serves jobs there
        ("versions", "node"): "ok",
        ("storage", "node"): "ok",
        ("gpu", "node"): "skipped",
        ("clock", "node"): "ok",
        ("nccl", "cluster"): "ok",
    }
    assert "SAPO_CONTROL_URL" in told["dns", "head"].remedy
    assert "torch 2.13.0" in told["versions", "node"].detail
    assert told["nccl", "cluster"].detail.startswith("gloo among 1 nodes without GPUs: a sum of 4 MiB took")
    assert list(tmp_path.iterdir()) == []


def test_an_interpreter_without_this_package_is_told_by_the_doctor(cluster: EmbeddedRay, tmp_path: Path) -> None:
    settings = load_settings(
        data_dir=tmp_path, ray_jobs_url=cluster.url, ray_auth_token=cluster.token, driver_python="/usr/bin/no-python"
    )
    (found,) = doctor_cluster.look(settings, ["versions"])
    assert (found.check, found.status, found.where) == ("ray", "failed", "cluster")
    assert "no-python" in found.detail
    assert "SAPO_DRIVER_PYTHON" in found.remedy


def test_a_second_submission_of_an_id_starts_nothing(jobs: RayJobs, tmp_path: Path) -> None:
    count = python(f"open({str(tmp_path / 'count')!r}, 'a').write('x')")
    for _ in range(3):
        jobs.submit_command("sapo-twice-1", count)
    assert ended(jobs, "sapo-twice-1").state == "SUCCEEDED"
    jobs.submit_command("sapo-twice-1", count)
    time.sleep(2.0)
    assert (tmp_path / "count").read_text() == "x"


def test_a_failure_comes_with_its_exit_code_and_the_last_lines(jobs: RayJobs) -> None:
    jobs.submit_command("sapo-bad-1", python("[print('line', n) for n in range(100)]; raise SystemExit(7)"))
    found = ended(jobs, "sapo-bad-1")
    assert found.state == "FAILED"
    first, *rest = found.message.splitlines()
    assert "exit code 7" in first
    assert rest[-1] == "line 99"
    assert "line 50" not in rest


def test_a_driver_is_stopped_with_time_to_say_goodbye(jobs: RayJobs) -> None:
    code = "import signal,sys,time\nsignal.signal(15, lambda *a: (time.sleep(5), print('goodbye'), sys.exit(0)))\n"
    jobs.submit_command("sapo-stop-1", python(code + "print('ready'); time.sleep(600)"))
    until("its start", lambda: "ready\n" in jobs.logs("sapo-stop-1"))
    jobs.stop("sapo-stop-1")
    assert ended(jobs, "sapo-stop-1").state == "STOPPED"
    assert "goodbye" in jobs.logs("sapo-stop-1")
    jobs.stop("sapo-stop-1")
    jobs.stop("sapo-never-1")


def test_the_service_keeps_its_secrets_from_drivers(
    tmp_path: Path, jobs: RayJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapo_ray.control.embedded import _environment

    monkeypatch.setenv("SAPO_ADMIN_KEY", "k" * 40)
    monkeypatch.setenv("SAPO_DATABASE_URL", "postgresql://user:password@host/db")
    kept = _environment("m", tmp_path / "token")
    assert not [name for name in kept if name.startswith("SAPO_") and name != "SAPO_EMBEDDED_RAY"]


def test_whoever_has_no_token_is_refused_and_the_token_is_for_this_user_alone(cluster: EmbeddedRay) -> None:
    with RayJobs(cluster.url) as stranger, pytest.raises(LauncherUnavailable, match="answered 401"):
        stranger.submit_command("sapo-stranger-1", "true")
    assert cluster._token_file.stat().st_mode & 0o777 == 0o600
    assert cluster.token not in cluster._log.read_text()


def test_a_driver_is_started_with_its_tokens_path_alone(jobs: RayJobs, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sapo_job_secret")
    request = LaunchRequest(
        submission_id="sapo-job-1",
        job_id="job",
        attempt=1,
        control_url="http://127.0.0.1:1",
        token_file=tmp_path / "token",
    )
    command = jobs.entrypoint(request)
    assert "secret" not in command
    assert shlex.split(command)[1:] == [
        *["-m", "sapo_ray.driver.main", "--job", "job", "--attempt", "1"],
        *["--control", "http://127.0.0.1:1", "--token-file", str(tmp_path / "token")],
    ]


def test_a_driver_is_started_in_a_cluster_of_its_own_with_the_token_that_was_made_for_it(
    cluster: EmbeddedRay, tmp_path: Path
) -> None:
    with kube_world(tmp_path) as kube:
        launcher = KubeClusters(
            KubeClient(kube.kube.url, kube.account),
            Options(template=kube.template, secret=SECRET, owner="sapo", python=sys.executable, look_every_s=0.0),
            address=lambda found: cluster.url if found.get("status") else "",
        )
        with launcher:
            with pytest.raises(NotStarted):
                launcher.submit(request())
            kube.operator.work()
            assert kube.operator.token(NAME) == cluster.token
            assert launcher.status(NAME).state == "UNKNOWN"
            launcher.submit(request())
            launcher.submit(request())
            until("the driver's end", lambda: launcher.status(NAME).over)
            assert launcher.status(NAME).state == "FAILED"
            assert f"/data/runs/{JOB}/.token-1" in launcher.logs(NAME)  # where it looked for its token


def test_ray_gone_is_told_and_a_new_head_serves_at_the_same_address(cluster: EmbeddedRay, jobs: RayJobs) -> None:
    jobs.submit_command("sapo-before-1", python("import time; time.sleep(600)"))
    record = cluster._record
    assert record is not None
    assert record.pid is not None
    driver = []
    until("its start", lambda: bool(driver.extend(_commands(record, "time.sleep(600)")) or driver))
    os.kill(record.pid, signal.SIGKILL)
    until("the head's end", lambda: not psutil.pid_exists(record.pid) or _zombie(record.pid))
    with pytest.raises(LauncherUnavailable):
        until("an error", lambda: jobs.ping() or False, 30.0)
    assert cluster.replace_if_dead(NEVER)
    assert jobs.status("sapo-before-1").state == "UNKNOWN"
    assert not processes_of(record), "drivers of the old head live on"
    jobs.submit_command("sapo-after-1", python("print('here')"))
    assert ended(jobs, "sapo-after-1").state == "SUCCEEDED"


def _zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _commands(record: Record, part: str) -> list[psutil.Process]:
    return [one for one in processes_of(record) if part in " ".join(one.cmdline())]


def test_what_is_not_ray_is_unavailable_not_unknown() -> None:
    """Another server on that port: a job must not be taken for gone because of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(
                        b"HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\nconnection: close\r\n\r\nNot found"
                    )

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with RayJobs(url) as jobs:
            with pytest.raises(LauncherUnavailable, match="404"):
                jobs.status("sapo-x-1")
            with pytest.raises(LauncherUnavailable):
                jobs.stop("sapo-x-1")
        thread.join(10.0)
