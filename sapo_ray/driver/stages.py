"""The stages of one attempt: checks, model and data, engines, training, the exported model, its copy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from sapo_ray.algorithms.settings import advice, resolve
from sapo_ray.config.architecture import find_architecture
from sapo_ray.config.estimate import estimate
from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.checkpoint import Checkpoints, step_of
from sapo_ray.driver.cluster import published_bytes, ray_for
from sapo_ray.driver.driver import Driver
from sapo_ray.driver.export import export
from sapo_ray.driver.inputs import Inputs, prepare_inputs
from sapo_ray.driver.interrupts import Interrupts
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.lifecycle import close_all, start_together
from sapo_ray.driver.orders import Ended, StandingOrders
from sapo_ray.driver.output import check_output, copied
from sapo_ray.driver.parts import Material, Parts, Tracker
from sapo_ray.driver.payloads import RayPayloads
from sapo_ray.driver.result import Outcome
from sapo_ray.driver.tracking import trackers_of
from sapo_ray.errors import TrainingFailed
from sapo_ray.learner.group import LearnerGroup
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.verifier.pool import VerifierPool


def train_and_export(attempt: Attempt, interrupts: Interrupts) -> Outcome:
    """All of them, from the newest checkpoint on. Blocks; raises SapoRayError, or Ended before anything was trained."""
    spec, orders, journal = attempt.spec, attempt.orders, attempt.journal
    check_output(spec)
    checkpoints = _checkpoints(attempt)
    with attempt.pulse.at("checkpoint", "checkpoint", "looking for the newest checkpoint"):
        checkpoint = checkpoints.newest()
    attempt.orders.check_start(has_checkpoint=checkpoint is not None)
    for warning in advice(spec):
        journal.event("condition", condition="Advice", reason=warning)
    inputs = _inputs(attempt, has_checkpoint=checkpoint is not None)
    step = step_of(checkpoint) if checkpoint else 0
    with attempt.hold.ready(), trackers_of(spec, attempt.run_dir, step, journal) as trackers:
        run = _run(attempt, inputs, checkpoints, checkpoint, trackers, interrupts)
        return asyncio.run(_until_told(copied(run, spec, journal, interrupts, attempt.pulse), orders))


def _checkpoints(attempt: Attempt) -> Checkpoints:
    """Those of the run, with room for another one: a service's run that held for it goes on holding."""
    spec = attempt.spec
    architecture = find_architecture(spec.model)
    checkpoints = Checkpoints(
        attempt.run_dir / "checkpoints",
        keep=spec.checkpoint.keep,
        min_free_gb=spec.checkpoint.min_free_gb,
        expected=0 if architecture is None else estimate(spec, architecture).checkpoint,
    )
    if attempt.orders.served and attempt.number > 1:
        attempt.hold.wait_at_start(checkpoints.check_space)
    else:
        checkpoints.check_space()
    return checkpoints


def _inputs(attempt: Attempt, *, has_checkpoint: bool) -> Inputs:
    attempt.journal.event("phase", phase="model")

    def on_warm_start(step: int, loss: float, accuracy: float) -> None:
        attempt.journal.event("warm_start", step=step, loss=loss, accuracy=accuracy)
        attempt.orders.check_start(has_checkpoint=has_checkpoint)

    attempt.pulse.phase = "model"
    with attempt.pulse.at("model", "model", "preparing model and data"):
        inputs = prepare_inputs(attempt.spec, attempt.run_dir / "model", on_warm_start)
    attempt.orders.check_start(has_checkpoint=has_checkpoint)
    return inputs


async def _until_told(run: Coroutine[Any, Any, Outcome], orders: StandingOrders) -> Outcome:
    """Orders leave a run the time it takes; what ends the attempt from outside, such as a later one, leaves none."""
    async with orders.heeded(lambda _: None):
        return await run


async def _run(
    attempt: Attempt,
    inputs: Inputs,
    checkpoints: Checkpoints,
    checkpoint: Path | None,
    trackers: list[Tracker],
    interrupts: Interrupts,
) -> Outcome:
    """Start the pools, drive them, export; end everything whatever happens."""
    spec, journal, pulse, model = attempt.spec, attempt.journal, attempt.pulse, str(inputs.model_path)
    interrupts.cancel_here()
    journal.event("phase", phase="start")
    pulse.phase = "start"
    began = time.monotonic()
    with ray_for(spec, published_bytes(inputs.model_path, spec.rollout_dtype), attempt.run_dir / "logs"):
        rollouts, verifiers = RolloutPool(spec, model), VerifierPool(spec.verifier)
        learner = LearnerGroup(spec, model)
        parts = Parts(rollouts=rollouts, verifiers=verifiers, learner=learner, payloads=RayPayloads())
        interrupts.cancel_here()  # again: Ray takes SIGTERM for itself
        beats = asyncio.create_task(pulse.beat(rollouts.activity, verifiers.activity, learner.activity))
        try:
            async with attempt.orders.heeded(attempt.orders.start_patience(has_checkpoint=checkpoint is not None)):
                with pulse.at("learner", "start", "starting"):
                    # The learner asks for its room first: rollout workers do with what is left.
                    await start_together(learner.start(), verifiers.start(), rollouts.start())
                await learner.set_canary(inputs.canary)
            started = time.monotonic() - began
            journal.event("transition", state="running", attempt_seconds=round(started, 1))
            objective = resolve(spec.algorithm, spec.rollout.max_new_tokens, spec.rollout.temperature)
            material = Material(prompts=inputs.prompts, evaluation=inputs.evaluation, objective=objective)
            driver = Driver(attempt, material, parts, checkpoints, trackers)
            outcome = await _driven(driver.run(checkpoint), rollouts, journal)
            outcome.seconds.update({"model": inputs.seconds, "start": started})
            return await _exported(outcome, attempt, inputs.model_path)
        finally:
            interrupts.ending()
            beats.cancel()
            await close_all(journal, rollouts=rollouts.close(), verifiers=verifiers.close(), learner=learner.close())


async def _exported(outcome: Outcome, attempt: Attempt, model: Path) -> Outcome:
    """With the trained model written, unless the run is to go on, or its model is not wanted."""
    if outcome.ending == "paused" or (outcome.ending == "cancelled" and attempt.orders.discard):
        return outcome
    folder, limit_s = attempt.run_dir / "export", attempt.spec.deadlines.checkpoint_s

    async def exported() -> Outcome:
        with attempt.pulse.at("export", "export", "writing the trained model"):
            return await export(outcome, model, folder, attempt.journal, limit_s)

    try:
        return await attempt.hold.through(exported)
    except Ended:  # cancelled while the disk is full
        attempt.journal.event("condition", condition="NotExported", reason="the disk is full")
        return outcome


async def _driven(driving: Coroutine[Any, Any, Outcome], rollouts: RolloutPool, journal: Journal) -> Outcome:
    """The driver's outcome; what happens to workers meanwhile belongs in the journal too."""
    forwarding = asyncio.create_task(_forward(rollouts.events, journal))
    try:
        return await unless_failed(driving, rollouts.until_failed())
    finally:
        forwarding.cancel()
        while not rollouts.events.empty():  # the last loss of a worker may be what explains a failure
            _worker_event(rollouts.events.get_nowait(), journal)


async def unless_failed(driving: Coroutine[Any, Any, Outcome], failing: Coroutine[Any, Any, TrainingFailed]) -> Outcome:
    """The driver's outcome, or at once why the rollout pool cannot go on, whatever the driver waits for."""
    run, failed = asyncio.create_task(driving), asyncio.create_task(failing)
    try:
        await asyncio.wait((run, failed), return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            raise failed.result()
        return run.result()
    finally:
        failed.cancel()
        run.cancel()
        await asyncio.gather(run, failed, return_exceptions=True)


async def _forward(events: asyncio.Queue[dict[str, Any]], journal: Journal) -> None:
    """What happens to workers belongs in the journal too."""
    while True:
        _worker_event(await events.get(), journal)


def _worker_event(event: dict[str, Any], journal: Journal) -> None:
    journal.event("worker", **{("what" if key == "kind" else key): value for key, value in event.items()})
