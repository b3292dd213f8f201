"""Evaluates a model without training it: rollout workers and verifiers, no learner."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import ray

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.cluster import ray_for
from sapo_ray.driver.collector import Collector
from sapo_ray.driver.evaluation import Evaluation, evaluate
from sapo_ray.driver.inputs import Inputs, prepare_inputs
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.run import published_bytes
from sapo_ray.errors import ConfigError
from sapo_ray.models.publish import publish_folder
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.types import PolicyVersion, Published
from sapo_ray.verifier.pool import VerifierPool


def evaluate_model(spec: JobSpec, work_dir: Path) -> dict[str, Any]:
    """Greedy and sampled accuracy of `spec.model` on `spec.evaluation.data`.

    Raises ConfigError if the job names no evaluation data.
    """
    if not spec.evaluation.data:
        raise ConfigError("evaluation.data is empty: name at least one source to evaluate on")
    began = time.monotonic()
    inputs = prepare_inputs(spec, work_dir / "model")
    evaluation = asyncio.run(_evaluate(spec, inputs, work_dir))
    return {"model": str(inputs.model_path), **evaluation.as_dict(), "seconds": round(time.monotonic() - began, 2)}


async def _evaluate(spec: JobSpec, inputs: Inputs, work_dir: Path) -> Evaluation:
    journal = Journal(work_dir / "journal.jsonl", attempt=1)
    version = PolicyVersion(1, 0)
    with ray_for(spec, published_bytes(inputs.model_path, spec.rollout_dtype), work_dir / "logs"):
        rollouts, verifiers = RolloutPool(spec, str(inputs.model_path)), VerifierPool(spec.verifier)
        try:
            await asyncio.gather(rollouts.start(), verifiers.start())
            await rollouts.update(await _publish(spec, inputs, version))
            collector = Collector(spec, rollouts, verifiers, journal)
            return await evaluate(collector, inputs.evaluation, spec, step=0, version=str(version), sampled=True)
        finally:
            journal.close()
            await asyncio.gather(rollouts.close(), verifiers.close(), return_exceptions=True)


async def _publish(spec: JobSpec, inputs: Inputs, version: PolicyVersion) -> Published:
    """The folder's weights as buckets in the object store, owned by this process."""
    stream = ray.remote(num_cpus=0, num_returns="streaming")(publish_folder).remote(
        str(inputs.model_path),
        version,
        spec.rollout_dtype,
        inputs.canary,
        spec.learner.bucket_mb << 20,
        spec.model.trust_remote_code,
    )
    *buckets, manifest = [ref async for ref in stream]
    return Published(manifest=await manifest, buckets=tuple(buckets))
