"""Runs that a control plane starts through Ray's Jobs API, on a cluster that no driver started, with real engines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_control import TOKEN, FakeControl, orders
from harness import rows
from ray_jobs import Cluster
from test_run import EXACT, SMALL

from sapo_ray.config.load import load_job

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SETTINGS = [one for one in SMALL if not one.startswith("evaluation.")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


def control_for(folder: Path, *settings: str) -> FakeControl:
    spec = load_job(ROOT / "configs" / "quickstart.yaml", [*SETTINGS, "evaluation.limit=16", *settings])
    (folder / "token").write_text(TOKEN)
    return FakeControl(assignment={"run_dir": str(folder / "run"), "spec": spec.model_dump(mode="json")}).start()


def launch(cluster: Cluster, control: FakeControl, folder: Path, attempt: int) -> str:
    name = f"sapo-{folder.name}-{attempt}"
    where = ["--job", folder.name, "--attempt", str(attempt), "--control", control.url]
    cluster.submit(name, [*where, "--token-file", str(folder / "token")])
    return name


def leaves_nothing(cluster: Cluster) -> tuple[list[tuple[str, str]], list[str]]:
    """Actors and placement groups that are still there after a bound; Ray ends them a moment after their driver."""
    end = time.monotonic() + 30
    while (left := (cluster.actors(), cluster.placement_groups())) != ([], []) and time.monotonic() < end:
        time.sleep(0.5)
    return left


def journalled(run_dir: Path, attempt: int) -> list[dict[str, Any]]:
    return [row for row in rows(run_dir / "journal.jsonl") if "seq" in row and row["attempt"] == attempt]


def losses(run_dir: Path) -> list[list[float]]:
    return [[row[key] for key in EXACT] for row in rows(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose control plane dies after the second step and is back after the fourth."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    control = control_for(folder)
    second = threading.Event()
    control.on_event = lambda event: second.set() if (event["kind"], event.get("step")) == ("step", 2) else None
    name = launch(cluster, control, folder, 1)
    assert second.wait(600), cluster.logs(name)[-4000:]
    control.stop()
    control.wait_for(lambda: len(rows(folder / "run" / "metrics.jsonl")) >= 4, 600)
    control.start()
    job = cluster.wait(name)
    control.stop()
    assert job["status"] == "SUCCEEDED", cluster.logs(name)[-4000:]
    assert control.events() == journalled(folder / "run", 1), "all of them, once, in order"
    assert control.events()[-1]["state"] == "succeeded"
    assert leaves_nothing(cluster) == ([], [])
    return folder / "run"


def test_a_run_goes_on_without_its_control_plane_and_its_logs_are_with_it(uninterrupted: Path) -> None:
    assert [row["step"] for row in rows(uninterrupted / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    logs = {path.name for path in (uninterrupted / "logs").iterdir() if path.stat().st_size}
    assert {"driver.log", "rollout-0.log", "verifier-0.log", "learner-0.log"} <= logs
    assert "the control plane is back after" in (uninterrupted / "logs" / "driver.log").read_text()


def test_a_paused_run_holds_nothing_and_its_next_attempt_repeats_the_losses_of_an_uninterrupted_one(
    cluster: Cluster, uninterrupted: Path, tmp_path: Path
) -> None:
    control = control_for(tmp_path, "checkpoint.every=0")

    def on_event(event: dict[str, Any]) -> None:
        if (event["kind"], event.get("step")) == ("step", 1):
            control.orders = orders(state="pause")

    control.on_event = on_event
    name = launch(cluster, control, tmp_path, 1)
    assert cluster.wait(name)["status"] == "SUCCEEDED", cluster.logs(name)[-4000:]
    paused = control.events()[-1]
    assert (paused["kind"], paused["state"]) == ("transition", "paused")
    at = paused["result"]["steps"]
    assert at in (2, 3), "the step under way, or the one after it where the order came between two"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step-{at:06d}"
    assert leaves_nothing(cluster) == ([], [])
    before = paused["result"]["accuracy"]["before"]
    assert before["greedy"]["prompts"] == 16

    control.newest, control.orders, control.on_event = 2, orders(generation=2), None
    name = launch(cluster, control, tmp_path, 2)
    assert cluster.wait(name)["status"] == "SUCCEEDED", cluster.logs(name)[-4000:]
    control.stop()
    assert losses(tmp_path / "run") == losses(uninterrupted)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["attempt"], result["steps"]) == ("succeeded", 2, 5)
    assert result["accuracy"]["before"] == before, "of the first attempt"
    assert result["accuracy"]["after"]["greedy"]["prompts"] == 16
    assert control.events(2) == journalled(tmp_path / "run", 2)
    assert [event["step"] for event in control.events(2) if event["kind"] == "step"] == list(range(at + 1, 6))


def test_a_cancelled_run_exports_its_newest_weights(cluster: Cluster, tmp_path: Path) -> None:
    control = control_for(tmp_path, "steps=500", "checkpoint.every=0")

    def on_event(event: dict[str, Any]) -> None:
        if (event["kind"], event.get("step")) == ("step", 1):
            control.orders = orders(state="cancel")

    control.on_event = on_event
    name = launch(cluster, control, tmp_path, 1)
    assert cluster.wait(name)["status"] == "SUCCEEDED", cluster.logs(name)[-4000:]
    control.stop()
    cancelled = control.events()[-1]
    assert cancelled["state"] == "cancelled"
    assert cancelled["result"]["steps"] < 10
    assert (tmp_path / "run" / "export" / "config.json").exists()
    assert list((tmp_path / "run" / "export").glob("*.safetensors"))
    assert leaves_nothing(cluster) == ([], [])
