"""Where metrics go: metrics.jsonl and TensorBoard always, Weights & Biases and MLflow where configured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.files import write_text
from sapo_ray.errors import ConfigError


class Tracker(Protocol):
    """Takes one row of metrics a step."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON object a step. Rows of an abandoned lineage are taken out on resume."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        if path.exists():
            rows = (line for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [line for line in rows if json.loads(line)["step"] <= resume_step]
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files under `tensorboard/`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run that a resume continues."""

    def __init__(self, spec: JobSpec, run_dir: Path) -> None:
        wandb = _optional("wandb", "logging.wandb_project")
        self._run = wandb.init(
            project=spec.logging.wandb_project,
            name=run_dir.name,
            id=run_dir.name,
            resume="allow",
            dir=str(run_dir),
            config=spec.model_dump(),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run named after the run directory."""

    def __init__(self, spec: JobSpec, run_dir: Path) -> None:
        self._mlflow = _optional("mlflow", "logging.mlflow_uri")
        self._mlflow.set_tracking_uri(spec.logging.mlflow_uri)
        self._mlflow.set_experiment(spec.name)
        self._mlflow.start_run(run_name=run_dir.name)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # MLflow allows no commas or brackets in names; ours have none.
        self._mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def open_trackers(spec: JobSpec, run_dir: Path, resume_step: int) -> list[Tracker]:
    """All trackers of a run; rows after `resume_step` are void."""
    trackers: list[Tracker] = [
        MetricsFile(run_dir / "metrics.jsonl", resume_step),
        TensorBoard(run_dir / "tensorboard", resume_step),
    ]
    optional: list[tuple[Any, Callable[[JobSpec, Path], Tracker]]] = [
        (spec.logging.wandb_project, WandB),
        (spec.logging.mlflow_uri, MLflow),
    ]
    return trackers + [make(spec, run_dir) for setting, make in optional if setting is not None]


def _optional(package: str, key: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ConfigError(
            f"{key} is set but {package} is not installed: pip install {package}, or remove the key"
        ) from error
