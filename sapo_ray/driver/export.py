"""The trained model, written for others: a Ray task near the weights does it, the driver only waits."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from sapo_ray.driver.files import came_of_a_full_disk, not_written
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.result import Outcome
from sapo_ray.errors import DeadlineExceeded
from sapo_ray.learner.export import export_hf


async def export(outcome: Outcome, model_path: Path, folder: Path, journal: Journal, limit_s: float) -> Outcome:
    """Write the trained model from the published buffer, which every transport leaves: the learner may be gone."""
    began = time.monotonic()
    journal.event("phase", phase="export")
    published = outcome.published
    assert published.buckets
    writing = ray.remote(num_cpus=0)(export_hf)
    try:
        async with asyncio.timeout(limit_s):
            await writing.remote(published.manifest, str(model_path), str(folder), *published.buckets)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the export was not written within deadlines.checkpoint_s ({limit_s:g} s); "
            "raise it and `sapo-ray resume` the run"
        ) from error
    except RayTaskError as error:  # safetensors has errors of its own for what the disk refuses
        if not came_of_a_full_disk(folder, error):
            raise
        raise not_written(folder, error.cause) from error
    outcome.seconds["export"] = time.monotonic() - began
    return replace(outcome, export=folder)
