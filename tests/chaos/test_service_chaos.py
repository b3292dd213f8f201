"""A job under the service, whose control plane, driver and cluster are killed one after the other."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from harness import rows
from test_serve import KEY, Service
from test_serve import data_dir as data_dir  # a fixture

from sapo_ray.audit import audit
from sapo_ray.control.embedded_processes import processes_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

SEED = 20261123
SETTINGS = {"SAPO_ALLOW_REWARDS": "example_reward:digits", "SAPO_HEARTBEAT_TIMEOUT_S": "20"}
SPEC = {
    "preset": "quickstart",
    "steps": 40,
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_staleness": 1},
    "evaluation": {"data": []},
    "checkpoint": {"every": 2},
    "model": {"warm_start_accuracy": None},
    "verifier": {"reward": "example_reward:digits"},
}
"""As the quickstart, with tiny steps, a random model, and many checkpoints."""


class Job:
    """The one job of a service, by way of its API and its run directory."""

    def __init__(self, url: str) -> None:
        self.call = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        answer = self.call.post("/v1/jobs", json={"spec": SPEC})
        assert answer.status_code == 201, answer.text
        self.id = str(answer.json()["id"])

    def status(self) -> dict[str, Any]:
        """What the service observed of it."""
        status: dict[str, Any] = self.call.get(f"/v1/jobs/{self.id}").json()["status"]
        return status

    def heard(self, attempt: int) -> list[tuple[str, int | None]]:
        """(kind, step) of all events of an attempt, as the service has them."""
        found: list[dict[str, Any]] = []
        while page := self.call.get(
            f"/v1/jobs/{self.id}/events", params={"limit": 1000, "after": found[-1]["id"] if found else 0}
        ).json()["data"]:
            found += page
        mine = [one for one in found if (one["source"], one["attempt"]) == ("driver", attempt)]
        return [(one["kind"], one["data"].get("step")) for one in mine]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward of the tests' own, and a driver that reports every moment."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "integration"), str(Path.cwd())]))
    monkeypatch.setenv("EXAMPLE_REWARD_PAUSE_S", "0.25")
    monkeypatch.setenv("SAPO_LINK_INTERVAL_S", "0.2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def part(service: Service, what: str) -> psutil.Process:
    """The driver, or a process of the service's own Ray by its name."""
    for one in processes_of(service.record()):
        with suppress(psutil.NoSuchProcess):
            if one.name() == what or (what == "driver" and one.cmdline()[1:3] == ["-m", "sapo_ray.driver.main"]):
                return one
    raise AssertionError(f"no {what}")


def test_a_job_outlives_its_control_plane_its_driver_and_its_cluster(data_dir: Path) -> None:
    chance = random.Random(SEED)
    service = Service(data_dir, port := free_port(), **SETTINGS)
    try:
        job = Job(service.until_it_serves())
        run_dir = data_dir / "runs" / job.id

        def steps(attempt: int) -> int:
            return sum((row["kind"], row["attempt"]) == ("step", attempt) for row in rows(run_dir / "journal.jsonl"))

        def a_moment() -> None:
            time.sleep(chance.uniform(0.0, 1.0))

        until(lambda: steps(1) >= 2, "two steps", 600)
        a_moment()
        service.end(signal.SIGKILL)
        done = steps(1)
        until(lambda: steps(1) >= done + 2, "two steps without a control plane")
        service = Service(data_dir, port, **SETTINGS)
        service.until_it_serves()
        until(lambda: job.status()["step"] >= steps(1) - 1, "the control plane to have caught up")
        assert (job.status()["state"], job.status()["attempt"]) == ("running", 1)

        a_moment()
        part(service, "driver").kill()
        until(lambda: steps(2) >= 2, "two steps of the second driver", 600)
        assert job.status()["attempt"] == 2

        a_moment()
        part(service, "raylet").kill()
        until(lambda: steps(3) >= 2, "two steps of the third driver, in another cluster", 600)
        until(lambda: job.status()["state"] not in ("running", "recovering"), "the end", 600)
        assert (job.status()["state"], job.status()["attempt"], job.status()["restarts"]) == ("succeeded", 3, 2)
        for attempt in (1, 2, 3):
            written = [
                (row["kind"], row.get("step"))
                for row in rows(run_dir / "journal.jsonl")
                if "seq" in row and row["attempt"] == attempt
            ]
            heard = job.heard(attempt)
            assert heard == written[: len(heard)], "once and in order"
            assert len(heard) == len(written) or attempt < 3, "all but what a killed driver had no time to say"
    finally:
        code = service.end(signal.SIGTERM)
    assert code == 0, (data_dir / "serve.log").read_text()[-4000:]
    report = audit(run_dir)
    assert report.findings == []
    assert report.totals["lost"] == report.totals["doubled"] == report.totals["outstanding"] == 0
    assert (report.totals["attempts"], report.totals["rollbacks"]) == (3, 2)
