"""Weights & Biases and MLflow. All calls here may block or raise: they are made by a BackgroundTracker's thread.

Which run of a service belongs to a run directory stands in its tracking.json, so that a resume continues it there.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from pathlib import Path

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.files import write_text

STEP = "training_step"
"""Metric of Weights & Biases against which all others are drawn: a resumed run goes back a few steps, and rows whose
own step number has passed would be refused."""
_LONGEST_NAME = 250


class WandB:
    """A Weights & Biases run that a resume continues."""

    def __init__(self, spec: JobSpec, run_dir: Path) -> None:
        import wandb

        project = spec.logging.wandb_project
        assert project is not None
        ids = _RunIds(run_dir)
        run_id = ids.read("wandb", project) or uuid.uuid4().hex
        ids.write("wandb", project, run_id)
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=spec.model_dump(mode="json"),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({**metrics, STEP: step})

    def rewind(self, step: int) -> None: ...

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run, named after the run directory, that a resume continues."""

    def __init__(self, spec: JobSpec, run_dir: Path) -> None:
        import mlflow

        uri = spec.logging.mlflow_uri
        assert uri is not None
        self._metric = mlflow.entities.Metric
        # A client of its own: no global state, and nothing registered to run when the process ends.
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        ids = _RunIds(run_dir)
        known = ids.read("mlflow", uri)
        if known:
            self._client.update_run(known, status="RUNNING")
            self._run_id = known
            return
        experiment = self._client.get_experiment_by_name(spec.name)
        place = self._client.create_experiment(spec.name) if experiment is None else experiment.experiment_id
        self._run_id = self._client.create_run(place, run_name=run_dir.name).info.run_id
        ids.write("mlflow", uri, self._run_id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        named = mlflow_names(metrics)
        self._client.log_batch(self._run_id, metrics=[self._metric(k, v, now, step) for k, v in named.items()])

    def rewind(self, step: int) -> None: ...

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def mlflow_names(metrics: dict[str, float]) -> dict[str, float]:
    """The same metrics under names that MLflow takes, no two of them alike.

    It takes letters, digits, `_ - . space /` and relative paths in their shortest form; parts of a reward may be named
    as their author likes.
    """
    named: dict[str, float] = {}
    for name, value in metrics.items():
        parts = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name)[:_LONGEST_NAME].split("/")
        legal = "/".join("_" if part in ("", ".", "..") else part for part in parts)
        unique, count = legal, 1
        while unique in named or (unique != name and unique in metrics):
            count += 1
            unique = f"{legal[: _LONGEST_NAME - 5]}_{count}"
        named[unique] = value
    return named


class _RunIds:
    """tracking.json: for each service where its run lies and which one it is."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "tracking.json"

    def read(self, service: str, where: str) -> str | None:
        """None if there is none yet, or the job now names another project or server."""
        entry = self._all().get(service, {})
        return str(entry["run"]) if entry.get("where") == where else None

    def write(self, service: str, where: str, run: str) -> None:
        write_text(self._path, json.dumps(self._all() | {service: {"where": where, "run": run}}, indent=1) + "\n")

    def _all(self) -> dict[str, dict[str, str]]:
        ids: dict[str, dict[str, str]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return ids
