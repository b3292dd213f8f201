"""Evaluates a model without training it: rollout workers and verifiers, no learner."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import ray

from sapo_ray.config.packages import check_secrets
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.cluster import published_bytes, ray_for
from sapo_ray.driver.collector import Collector
from sapo_ray.driver.evaluation import Evaluation, evaluate
from sapo_ray.driver.inputs import EvaluationInputs, prepare_evaluation
from sapo_ray.driver.interrupts import Interrupts
from sapo_ray.driver.journal import Journal, Listener
from sapo_ray.driver.lifecycle import close_all, start_together
from sapo_ray.driver.waits import bounded
from sapo_ray.errors import ConfigError
from sapo_ray.models.publish import publish_folder
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.types import PolicyVersion, Published
from sapo_ray.verifier.pool import VerifierPool


def evaluate_model(spec: JobSpec, work_dir: Path, listener: Listener | None = None) -> dict[str, Any]:
    """Greedy and sampled accuracy of `spec.model` on `spec.evaluation.data`; the training data is not opened.

    `listener` hears the events of a run that lead up to its first evaluation, and `evaluating` after each prompt.

    Raises:
        ConfigError: the job names no evaluation data, or a secret that is not set.
        DeadlineExceeded: the evaluation was not done within deadlines.evaluation_s.
    """
    check_secrets(spec)
    if not spec.evaluation.data:
        raise ConfigError("evaluation.data is empty: name at least one source to evaluate on")
    began = time.monotonic()
    journal = Journal(work_dir / "journal.jsonl", 1, listener)
    try:
        journal.event("phase", phase="model")
        inputs = prepare_evaluation(
            spec,
            work_dir / "model",
            lambda step, loss, accuracy: journal.event("warm_start", step=step, loss=loss, accuracy=accuracy),
        )
        with Interrupts().heard() as interrupts:
            evaluation = asyncio.run(_evaluate(spec, inputs, journal, interrupts))
    finally:
        journal.close()
    return {"model": str(inputs.model_path), **evaluation.as_dict(), "seconds": round(time.monotonic() - began, 2)}


async def _evaluate(spec: JobSpec, inputs: EvaluationInputs, journal: Journal, interrupts: Interrupts) -> Evaluation:
    interrupts.cancel_here()
    version = PolicyVersion(1, 0)
    total = len(inputs.evaluation)

    def on_group(kind: str, done: int) -> None:
        journal.event("evaluating", completions=kind, done=done, prompts=total)

    journal.event("phase", phase="start")
    with ray_for(spec, published_bytes(inputs.model_path, spec.rollout_dtype), None):
        rollouts, verifiers = RolloutPool(spec, str(inputs.model_path)), VerifierPool(spec.verifier)
        interrupts.cancel_here()  # again: Ray takes SIGTERM for itself
        try:
            await start_together(rollouts.start(), verifiers.start())
            async with bounded(
                2 * spec.deadlines.publish_s, "publishing the model's weights", lambda: "; see deadlines.publish_s"
            ):
                await rollouts.update(await _publish(spec, inputs, version))
            journal.event("phase", phase="evaluating", prompts=total)
            collector = Collector(spec, rollouts, verifiers, journal)
            async with bounded(spec.deadlines.evaluation_s, "the evaluation", lambda: "; see deadlines.evaluation_s"):
                return await evaluate(
                    collector,
                    inputs.evaluation,
                    spec,
                    step=0,
                    version=str(version),
                    sampled=True,
                    on_group=on_group,
                )
        finally:
            interrupts.ending()
            await close_all(journal, rollouts=rollouts.close(), verifiers=verifiers.close())


async def _publish(spec: JobSpec, inputs: EvaluationInputs, version: PolicyVersion) -> Published:
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
