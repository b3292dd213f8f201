"""`sapo-ray serve` with a Ray of its own: what it starts it ends, and what it was killed beside it finds again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from sapo_ray.control.embedded_processes import Record, is_alive, processes_of

pytestmark = pytest.mark.integration

KEY = "sapo_" + "k" * 43
READY_S = 180.0
END_S = 90.0


class Service:
    """The service in a process of its own."""

    def __init__(self, data_dir: Path, port: int = 0, **settings: str) -> None:
        self.data_dir = data_dir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sapo_ray.control.serve"],
            env={
                **os.environ,
                "SAPO_DATA_DIR": str(data_dir),
                "SAPO_PORT": str(port),
                "SAPO_ADMIN_KEY": KEY,
                **settings,
            },
            stdout=subprocess.PIPE,
            stderr=(data_dir / "serve.log").open("ab"),
            text=True,
        )

    def until_it_serves(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("sapo-ray serves http://127.0.0.1:"), (line, (self.data_dir / "serve.log").read_text())
        return line.split()[2]

    def record(self) -> Record:
        return Record(**json.loads((self.data_dir / "ray.json").read_text()))

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(END_S)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """Whatever a failing test leaves is ended all the same."""
    yield tmp_path
    path = tmp_path / "ray.json"
    if path.exists():
        for one in processes_of(Record(**json.loads(path.read_text()))):
            one.kill()


def still_there(pids: list[int]) -> list[int]:
    """Those that exist a moment later: whoever was killed may still wait for its new parent to take note."""
    deadline = time.monotonic() + 10.0
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def shared_memory() -> set[str]:
    """Files in shared memory, but for those of database servers that other tests run."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("PostgreSQL")}


def ports_of(pids: list[int]) -> set[int]:
    return {one.laddr.port for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.pid in pids}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_is_told_to_end_leaves_nothing_behind(data_dir: Path, number: int) -> None:
    shared = shared_memory()
    service = Service(data_dir)
    url = service.until_it_serves()
    assert httpx.get(f"{url}/readyz", timeout=30).json()["status"] == "ready"
    record = service.record()
    pids = [one.pid for one in processes_of(record)]
    ports = ports_of([*pids, service.process.pid])
    assert len(pids) > 5
    assert record.dashboard in ports
    answer = httpx.post(
        f"{url}/v1/jobs",
        json={"spec": {"preset": "quickstart"}},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=30,
    )
    assert answer.status_code == 201, answer.text
    job = f"{url}/v1/jobs/{answer.json()['id']}"
    deadline = time.monotonic() + 120.0
    while httpx.get(job, headers={"Authorization": f"Bearer {KEY}"}, timeout=30).json()["status"]["last_heard"] is None:
        assert time.monotonic() < deadline, "the driver never reported"
        time.sleep(0.5)
    assert service.end(number) == 0, (data_dir / "serve.log").read_text()[-4000:]
    assert processes_of(record) == []
    assert not still_there(pids)
    assert not [one for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port in ports]
    assert not Path(record.folder).exists()
    assert not (data_dir / "ray.json").exists()
    assert shared_memory() <= shared
    check_that_the_job_waits(data_dir)


def check_that_the_job_waits(data_dir: Path) -> None:
    """A restart of the service costs a job none of its own restarts."""
    from sapo_ray.control.store import Store, jobs

    store = Store(f"sqlite:///{data_dir / 'control.db'}")
    with store.read() as s:
        [row] = jobs.list_jobs(s, None)
        assert (row.state, row.restarts, row.attempt) == ("queued", 0, 1), row.reason
    store.close()


def test_a_service_that_is_told_to_end_while_its_cluster_starts_leaves_nothing_behind(data_dir: Path) -> None:
    service = Service(data_dir)
    deadline = time.monotonic() + READY_S
    while not (data_dir / "ray.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    record = service.record()
    time.sleep(2.0)
    assert service.end(signal.SIGTERM) == 0
    assert processes_of(record) == []
    assert not Path(record.folder).exists()


def test_a_service_finds_the_cluster_of_one_that_was_killed_and_ends_it(data_dir: Path) -> None:
    first = Service(data_dir)
    first.until_it_serves()
    record = first.record()
    first.end(signal.SIGKILL)
    assert is_alive(record), "training would have ended with the service"
    second = Service(data_dir)
    url = second.until_it_serves()
    assert second.record() == record
    assert httpx.get(f"{url}/readyz", timeout=30).json()["checks"]["cluster"] == "ok"
    third = Service(data_dir)
    assert third.process.wait(READY_S) != 0
    assert "another service runs with a Ray of its own" in (data_dir / "serve.log").read_text()
    assert second.end(signal.SIGTERM) == 0
    assert processes_of(record) == []
    assert not Path(record.folder).exists()
