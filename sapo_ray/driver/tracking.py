"""Where metrics go: metrics.jsonl and TensorBoard always, Weights & Biases and MLflow where configured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from sapo_ray.config.packages import check_packages
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.background import BackgroundTracker
from sapo_ray.driver.files import append, not_written, write_text
from sapo_ray.driver.journal import Journal, json_line
from sapo_ray.driver.parts import Tracker
from sapo_ray.driver.services import MLflow, WandB
from sapo_ray.errors import CheckpointError


class MetricsFile:
    """metrics.jsonl: one JSON object a step. Rows of an abandoned lineage are taken out."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._file = self._cut(resume_step)

    def _cut(self, step: int) -> int:
        """Leave the rows up to `step`; returns the file, open at its end."""
        kept, path = [], self._path
        if path.exists():
            rows = (line for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [line for number, line in enumerate(rows, 1) if _step(path, number, line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        try:
            append(self._file, json_line({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise not_written(self._path, error) from error

    def rewind(self, step: int) -> None:
        before, self._file = self._file, self._cut(step)
        os.close(before)

    def close(self) -> None:
        os.close(self._file)


def _step(path: Path, number: int, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}, row {number}: not a row of metrics ({error}); remove the line, or the file"
        ) from error


class TensorBoard:
    """Event files under `tensorboard/`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)
        self._broken = False
        """A row was not written whole; tensorboard's writer raises for ever after."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        try:
            if self._broken:
                self._reopen(step)
            self._broken = True
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
            self._broken = False
        except OSError as error:
            raise not_written(self._folder, error) from error

    def rewind(self, step: int) -> None:
        try:
            self._reopen(step + 1)
        except OSError as error:
            raise not_written(self._folder, error) from error

    def close(self) -> None:
        self._writer.close()

    def _reopen(self, step: int) -> None:
        """A file of its own for `step` and later ones; what other files hold of them is void."""
        with suppress(OSError):  # what it could not write is written again
            self._writer.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=step)


def open_trackers(spec: JobSpec, run_dir: Path, resume_step: int, warn: Callable[[str], None]) -> list[Tracker]:
    """All trackers of a run; rows after `resume_step` are void. `warn` is told where a service gives trouble.

    Raises:
        ConfigError: a service is configured whose package is not installed.
    """
    check_packages(spec)
    trackers: list[Tracker] = [
        MetricsFile(run_dir / "metrics.jsonl", resume_step),
        TensorBoard(run_dir / "tensorboard", resume_step),
    ]
    if spec.logging.wandb_project is not None:
        name = "Weights & Biases (logging.wandb_project)"
        trackers.append(BackgroundTracker(name, lambda: WandB(spec, run_dir), warn))
    if spec.logging.mlflow_uri is not None:
        trackers.append(BackgroundTracker("MLflow (logging.mlflow_uri)", lambda: MLflow(spec, run_dir), warn))
    return trackers


@contextmanager
def trackers_of(spec: JobSpec, run_dir: Path, resume_step: int, journal: Journal) -> Iterator[list[Tracker]]:
    """Opened and closed around the loop, not in it: closing one may take a while, and nothing else is under way then.

    Raises: as open_trackers.
    """

    def warn(reason: str) -> None:
        journal.event("condition", condition="TrackerTrouble", reason=reason)

    trackers = open_trackers(spec, run_dir, resume_step, warn)
    try:
        yield trackers
    finally:
        for tracker in trackers:
            try:
                tracker.close()
            except OSError as error:  # what is still buffered; a row that matters was refused when it was logged
                warn(f"{type(tracker).__name__} could not be closed: {error}")
