"""Trackers: what they write, and that none of them can hold training up or end it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fakes import job

from sapo_ray.config.load import load_job, resolve, resume_job
from sapo_ray.driver.background import BackgroundTracker
from sapo_ray.driver.services import MLflow, WandB, mlflow_names
from sapo_ray.driver.tracking import open_trackers
from sapo_ray.errors import ConfigError


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(job(), tmp_path, 0, print)
    for step, value in ((1, 0.25), (2, 0.5)):
        for tracker in trackers:
            tracker.log(step, {"reward/mean": value})
    for tracker in trackers:
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


class Recorder:
    """A tracker that does as it is told."""

    def __init__(self, on_log: Callable[[int], None] = lambda step: None) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.threads: set[str] = set()
        self._on_log = on_log

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._on_log(step)
        self.threads.add(threading.current_thread().name)
        self.rows.append((step, metrics))

    def close(self) -> None:
        self.closed = True


def test_rows_arrive_in_order_from_one_thread_that_is_not_the_loops() -> None:
    inner, warnings = Recorder(), []
    tracker = BackgroundTracker("it", lambda: inner, warnings.append)
    for step in range(1, 101):
        tracker.log(step, {"loss": float(step)})
    tracker.close()
    assert inner.rows == [(step, {"loss": float(step)}) for step in range(1, 101)]
    assert inner.threads == {"tracker-it"}
    assert inner.closed
    assert warnings == []


def test_a_service_that_never_answers_holds_nothing_up_and_its_drops_are_counted_and_told_once() -> None:
    never = threading.Event()
    inner, warnings = Recorder(lambda step: never.wait(60) and None), []
    tracker = BackgroundTracker("it", lambda: inner, warnings.append, capacity=5, close_s=0.2)
    try:
        for step in range(1, 101):
            tracker.log(step, {"loss": 0.0})  # returns, or the test's own deadline ends it
        assert warnings == [
            "it: takes no rows; 5 are waiting and further ones are left out; training goes on without it"
        ]
        tracker.close()
        assert warnings[1:] == ["it: 100 rows did not arrive; metrics.jsonl and TensorBoard have them"]
    finally:
        never.set()


def test_a_service_that_raises_is_told_once_and_gets_the_next_rows() -> None:
    def raise_on_two_and_three(step: int) -> None:
        if step in (2, 3):
            raise ConnectionError(f"no route at {step}")

    inner, warnings = Recorder(raise_on_two_and_three), []
    tracker = BackgroundTracker("it", lambda: inner, warnings.append)
    for step in (1, 2, 3, 4):
        tracker.log(step, {})
    tracker.close()
    assert [step for step, _ in inner.rows] == [1, 4]
    assert warnings == [
        "it: ConnectionError: no route at 2; training goes on without it",
        "it: 2 rows did not arrive; metrics.jsonl and TensorBoard have them",
    ]


def test_a_service_that_cannot_be_opened_yet_is_opened_at_a_later_row() -> None:
    inner, warnings, opened = Recorder(), [], []

    def open_it() -> Recorder:
        opened.append(True)
        if len(opened) == 1:
            raise OSError("no network")
        return inner

    tracker = BackgroundTracker("it", open_it, warnings.append)
    tracker.log(1, {})
    tracker.log(2, {})
    tracker.close()
    assert [step for step, _ in inner.rows] == [2]
    assert "OSError: no network" in warnings[0]


@pytest.mark.parametrize("calls", ["Weights & Biases", "MLflow"])
def test_a_configured_service_is_never_called_by_the_thread_that_logs(
    tmp_path: Path, calls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even its import may hang: here it does, and rows are still taken at once."""
    never = threading.Event()

    class Hanging(ModuleType):
        def __getattr__(self, name: str) -> Any:
            never.wait(60)
            raise AttributeError(name)

    package, key = ("wandb", "wandb_project") if calls != "MLflow" else ("mlflow", "mlflow_uri")
    monkeypatch.setitem(sys.modules, package, Hanging(package))
    trackers = open_trackers(job(logging={key: "x"}), tmp_path, 0, print)
    try:
        assert len(trackers) == 3
        for tracker in trackers:
            tracker.log(1, {"loss": 1.0})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step":1,"loss":1.0}\n'
    finally:
        never.set()
        for tracker in trackers:
            tracker.close()


def test_names_that_mlflow_refuses_are_mended_and_stay_apart() -> None:
    metrics = {
        "reward/mean": 1.0,
        "reward/part_länge, [s]": 2.0,
        "reward/part_l_nge_ _s_": 3.0,
        "reward//../part:a": 4.0,
        "x" * 300: 5.0,
    }
    named = mlflow_names(metrics)
    assert list(named.values()) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert list(named) == [
        "reward/mean",
        "reward/part_l_nge_ _s__2",
        "reward/part_l_nge_ _s_",
        "reward/_/_/part_a",
        "x" * 250,
    ]


class FakeMLflow(ModuleType):
    """Keeps runs as the server does."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.status: dict[str, str] = {}
        self.entities = SimpleNamespace(Metric=lambda k, v, at, step: (k, v, step))

    def MlflowClient(self, tracking_uri: str) -> FakeMLflow:
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        run_id = f"{run_name}-{len(self.runs)}"
        self.runs[run_id] = []
        self.status[run_id] = "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.status[run_id] = status

    def log_batch(self, run_id: str, metrics: list[tuple[str, float, int]]) -> None:
        self.runs[run_id].append((metrics[0][2], {k: v for k, v, _ in metrics}))

    def set_terminated(self, run_id: str) -> None:
        self.status[run_id] = "FINISHED"


def test_a_resume_continues_the_mlflow_run_unless_the_server_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", server)
    run_dir = tmp_path / "a-run"
    run_dir.mkdir()
    for step, uri in ((1, "http://one"), (2, "http://one"), (3, "http://two")):
        tracker = MLflow(job(logging={"mlflow_uri": uri}), run_dir)
        tracker.log(step, {"reward/mean": step / 2})
        tracker.close()
    assert server.runs == {
        "a-run-0": [(1, {"reward/mean": 0.5}), (2, {"reward/mean": 1.0})],
        "a-run-1": [(3, {"reward/mean": 1.5})],
    }
    assert set(server.status.values()) == {"FINISHED"}


def test_a_resume_continues_the_wandb_run_and_two_folders_of_one_name_are_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []

    def init(**settings: Any) -> Any:
        started.append(settings)
        return SimpleNamespace(define_metric=lambda *a, **k: None, log=lambda row: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    for parent in ("one", "one", "two"):
        run_dir = tmp_path / parent / "run"
        run_dir.mkdir(parents=True, exist_ok=True)
        WandB(job(logging={"wandb_project": "p"}), run_dir).close()
    ids = [settings["id"] for settings in started]
    assert ids[0] == ids[1] != ids[2]
    assert {settings["resume"] for settings in started} == {"allow"}


@pytest.mark.parametrize(("key", "package"), [("wandb_project", "wandb"), ("mlflow_uri", "mlflow")])
def test_a_tracker_that_is_not_installed_is_found_when_the_job_is_read(
    tmp_path: Path, key: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"logging\.{key} is set but {package} is not installed: pip install {package}, or remove the key"
    path = tmp_path / "job.yaml"
    path.write_text("preset: quickstart\n")
    with pytest.raises(ConfigError, match=said):
        load_job(path, [f"logging.{key}=x"])
    stored = resolve({"preset": "quickstart"}).model_dump(mode="json")
    with pytest.raises(ConfigError, match=said):
        resume_job(stored, [f"logging.{key}=x"])
    assert resolve(stored, [f"logging.{key}=x"]), "a job may be described where it does not run"
