"""The run directory: what is where, who may write, which attempt this is.

spec.json        the resolved job                     metrics.jsonl   one row a step
journal.jsonl    ledger and events                    samples.jsonl   texts of a few groups a step
attempt          number of the newest attempt         tensorboard/    the same metrics
model/           a builtin model, if one was made     checkpoints/    see checkpoint.py
logs/            what the actors printed              export/         the trained model, Hugging Face format
result.json      how it ended                         tracking.json   runs of Weights & Biases and MLflow
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sapo_ray.config.load import to_json
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.files import write_text
from sapo_ray.driver.journal import Journal, last_attempt
from sapo_ray.errors import CheckpointError, ConfigError, Superseded

HOLD_RETRY_S = 0.5


def new_run_dir(spec: JobSpec) -> Path:
    """The folder for a new run: `run_dir`, or one named after job and time; never one whose run took a step."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(spec.run_dir) if spec.run_dir else Path("runs") / f"{spec.name}-{stamp}"
    metrics = path / "metrics.jsonl"
    if (path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size):
        raise ConfigError(
            f"run_dir {path} holds a run already; go on with it by `sapo-ray resume {path}`, or name another folder"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir {path} cannot be made ({error.strerror}); name a folder that is there, or one that may be made"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir {path} cannot be written to by this user; name another folder")
    return path.absolute()


def read_stored(run_dir: Path) -> dict[str, Any]:
    """The resolved job of an existing run, as it was stored."""
    path = run_dir / "spec.json"
    if not path.is_file():
        raise CheckpointError(f"{run_dir} is not a run directory: it has no spec.json")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(stored, dict):
        raise _damaged(path, "not a JSON object")
    return stored


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({problem}); restore it from a copy: without it nobody knows what this run was"
    )


def write_spec(run_dir: Path, spec: JobSpec) -> None:
    """Keep the resolved job with the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "spec.json", to_json(spec))


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Be the only driver on this machine that writes to the run; the lock goes with the process, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise CheckpointError(
                f"another process ({file.read().strip() or 'unknown'}) is writing to {run_dir}; wait for it or end it"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield


@contextmanager
def hold_within(run_dir: Path, seconds: float) -> Iterator[None]:
    """As `hold`, but wait for a driver that has just been superseded to let go. Raises CheckpointError after that."""
    end = time.monotonic() + seconds
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(run_dir))
            except CheckpointError:
                if time.monotonic() >= end:
                    raise
            else:
                yield
                return
        time.sleep(HOLD_RETRY_S)


def next_attempt(run_dir: Path) -> int:
    """Number of this attempt, from 1, recorded before anything else is written."""
    path = run_dir / "attempt"
    attempt = _newest_attempt(path) + 1 if path.exists() else 1
    write_text(path, f"{attempt}\n")
    return attempt


def begin_attempt(run_dir: Path, attempt: int) -> None:
    """Make the run this attempt's, whose number somebody else counted; every earlier one is superseded from here on.

    Raises:
        Superseded: a later attempt has the run, or this one had begun before and its events would be numbered twice.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "attempt"
    newest = _newest_attempt(path) if path.exists() else 0
    if newest > attempt:
        raise Superseded(f"attempt {attempt} of {run_dir} was superseded: attempt {newest} has the run")
    if newest == attempt and last_attempt(run_dir / "journal.jsonl") == attempt:
        raise Superseded(f"attempt {attempt} of {run_dir} had begun before; a new one needs a number of its own")
    write_text(path, f"{attempt}\n")


def superseded(run_dir: Path, attempt: int) -> bool:
    """Whether a later attempt has taken the run over."""
    return _newest_attempt(run_dir / "attempt") > attempt


def stop_if_superseded(run_dir: Path, journal: Journal) -> None:
    """Raise Superseded if a later attempt has taken the run over; this one's journal takes no more then."""
    if superseded(run_dir, journal.attempt):
        error = Superseded(
            f"attempt {journal.attempt} of {run_dir} was superseded by a later one, which goes on with the run"
        )
        journal.fence(error)
        raise error


def _newest_attempt(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); write the number of the newest attempt into it, as journal.jsonl has it"
        ) from error
