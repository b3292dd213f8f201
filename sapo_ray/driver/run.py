"""One run from its job to its result: puts the parts together, runs the driver, leaves nothing behind.

`train` and `resume` are what the command line calls, `assigned` what a control plane starts (main.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from sapo_ray.algorithms.settings import advice, resolve
from sapo_ray.config.architecture import find_architecture
from sapo_ray.config.estimate import estimate
from sapo_ray.config.load import resume_job
from sapo_ray.config.packages import check_secrets
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.checkpoint import Checkpoints, step_of
from sapo_ray.driver.cluster import published_bytes, ray_for
from sapo_ray.driver.driver import Driver, Outcome, Parts
from sapo_ray.driver.export import export
from sapo_ray.driver.files import write_text
from sapo_ray.driver.hold import DiskHold
from sapo_ray.driver.inputs import Inputs, prepare_inputs
from sapo_ray.driver.interrupts import Interrupts
from sapo_ray.driver.journal import Journal, Listener
from sapo_ray.driver.lifecycle import close_all, start_together
from sapo_ray.driver.link import Link
from sapo_ray.driver.masking import hidden_of, masked
from sapo_ray.driver.orders import Ended, StandingOrders
from sapo_ray.driver.output import check_output, copied
from sapo_ray.driver.parts import Tracker
from sapo_ray.driver.payloads import RayPayloads
from sapo_ray.driver.pulse import Pulse, pulse_of
from sapo_ray.driver.result import finished_steps, machine, package_versions, reason, summary
from sapo_ray.driver.rundir import hold, new_run_dir, next_attempt, read_stored, write_spec
from sapo_ray.driver.tracking import trackers_of
from sapo_ray.errors import ConfigError, DeadlineExceeded, ResourceError, Superseded, TrainingFailed, WorkerLost
from sapo_ray.learner.group import LearnerGroup
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.verifier.pool import VerifierPool

log = logging.getLogger(__name__)

RECOVERABLE = (WorkerLost, DeadlineExceeded, RayError)
"""Ends of an attempt that another one from the newest checkpoint may outlive; a control plane decides whether."""


def train(spec: JobSpec, listener: Listener | None = None) -> dict[str, Any]:
    """Run a new job to its end; returns what result.json holds. Raises SapoRayError for what the user can mend."""
    check_secrets(spec)
    return _attempt(spec, new_run_dir(spec), listener)


def resume(run_dir: Path, overrides: list[str], listener: Listener | None = None) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint, or from the start if it has none."""
    spec, changes = resume_job(read_stored(run_dir), overrides)
    check_secrets(spec)
    finished = finished_steps(run_dir)
    if finished is not None and spec.steps <= finished:
        raise ConfigError(
            f"{run_dir} has taken all its {finished} steps and succeeded; "
            f"to train on, --set steps=N with N > {finished}"
        )
    return _attempt(spec, run_dir.absolute(), listener, changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """What a control plane gives an attempt beside its job."""

    attempt: int
    orders: StandingOrders
    link: Link


def assigned(spec: JobSpec, run_dir: Path, changes: Sequence[str], by: Assigned) -> dict[str, Any]:
    """One attempt under a control plane, by the process that holds the run. Goes on from the newest checkpoint."""
    spec = spec.model_copy(update={"run_dir": str(run_dir)})
    write_spec(run_dir, spec)
    with Interrupts().heard() as interrupts:
        return _journalled(spec, run_dir, by.link.hear, changes, by, interrupts)


def _attempt(spec: JobSpec, run_dir: Path, listener: Listener | None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """One attempt, by the only process that writes to the run."""
    spec = spec.model_copy(update={"run_dir": str(run_dir)})
    with hold(run_dir), Interrupts().heard() as interrupts:
        write_spec(run_dir, spec)
        return _journalled(spec, run_dir, listener, changes, None, interrupts)


def _journalled(
    spec: JobSpec,
    run_dir: Path,
    listener: Listener | None,
    changes: Sequence[str],
    by: Assigned | None,
    interrupts: Interrupts,
) -> dict[str, Any]:
    """One attempt, in the journal from its first moment to its last."""
    attempt = next_attempt(run_dir) if by is None else by.attempt
    hidden = hidden_of(spec)
    journal = Journal(run_dir / "journal.jsonl", attempt, listener, hidden)
    result: dict[str, Any] = {"name": spec.name, "run_dir": str(run_dir), "attempt": attempt, "seed": spec.seed}
    result |= {"versions": package_versions(), "machine": machine()}

    def end(state: str, why: str, **more: Any) -> None:
        """The result before the transition: whoever hears of the end finds it. What failed first stays the error."""
        journal.check()
        result.update({"status": state, "reason": masked(why, hidden), **more})
        refused = None
        try:
            write_text(run_dir / "result.json", json.dumps(result, indent=1) + "\n")
        except ResourceError as error:
            refused = error
        journal.event("transition", state=state, reason=why, **({} if by is None else {"result": result}))
        if refused is not None and state != "succeeded":
            log.error("%s", refused)
        elif refused is not None:
            raise refused

    try:
        if by is not None:
            by.link.open(journal)
        write_text(run_dir / "result.json", json.dumps(result | {"status": "running"}, indent=1) + "\n")
        journal.event("transition", state="starting", run_dir=str(run_dir), changes=list(changes))
        journal.sync_now()
        orders = StandingOrders() if by is None else by.orders
        with pulse_of(spec, journal, None if by is None else by.link.activity) as pulse:
            outcome = _train_and_export(spec, run_dir, attempt, journal, orders, interrupts, pulse)
    except Ended as order:
        end(order.state, f"{order.state} while the job was starting; nothing was trained by this attempt")
    except Superseded as error:
        journal.fence(error)
        raise
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupts.ending()
        end("interrupted", "interrupted by the user" if by is None else "the driver was told to end")
        raise
    except BaseException as error:
        again = by is not None and isinstance(error, RECOVERABLE)
        end("interrupted" if again else "failed", f"{type(error).__name__}: {error}")
        raise
    else:
        end(outcome.ending or "succeeded", reason(outcome), **summary(outcome))
    finally:
        first = sys.exc_info()[1]
        try:
            if by is not None:
                by.link.close()
        finally:
            try:
                journal.close()
            except ResourceError as error:
                if first is None:
                    raise
                log.error("%s", error)
    return result


def _train_and_export(
    spec: JobSpec,
    run_dir: Path,
    attempt: int,
    journal: Journal,
    orders: StandingOrders,
    interrupts: Interrupts,
    pulse: Pulse,
) -> Outcome:
    """From the checks that need no engine to the exported model."""
    check_output(spec)
    architecture = find_architecture(spec.model)
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        keep=spec.checkpoint.keep,
        min_free_gb=spec.checkpoint.min_free_gb,
        expected=0 if architecture is None else estimate(spec, architecture).checkpoint,
    )
    hold = DiskHold(run_dir, journal, orders)
    if orders.served and attempt > 1:
        hold.wait_at_start(checkpoints.check_space)
    else:
        checkpoints.check_space()
    checkpoint = checkpoints.newest()
    for warning in advice(spec):
        journal.event("condition", condition="Advice", reason=warning)
    journal.event("phase", phase="model")

    def on_warm_start(step: int, loss: float, accuracy: float) -> None:
        journal.event("warm_start", step=step, loss=loss, accuracy=accuracy)
        orders.check_start(has_checkpoint=checkpoint is not None)

    pulse.phase = "model"
    with pulse.at("model", "model", "preparing model and data"):
        inputs = prepare_inputs(spec, run_dir / "model", on_warm_start)
    orders.check_start(has_checkpoint=checkpoint is not None)
    step = step_of(checkpoint) if checkpoint else 0
    with (
        hold.ready(),
        trackers_of(spec, run_dir, step, journal) as trackers,
    ):
        run = _run(
            spec, inputs, run_dir, attempt, journal, checkpoints, checkpoint, trackers, orders, hold, interrupts, pulse
        )
        return asyncio.run(_unless_failed(copied(run, spec, journal, interrupts, pulse), orders))


async def _unless_failed(run: Coroutine[Any, Any, Outcome], orders: StandingOrders) -> Outcome:
    """Orders leave a run the time it takes; another attempt that takes it over leaves none."""
    async with orders.heeded(lambda _: None):
        return await run


async def _run(
    spec: JobSpec,
    inputs: Inputs,
    run_dir: Path,
    attempt: int,
    journal: Journal,
    checkpoints: Checkpoints,
    checkpoint: Path | None,
    trackers: list[Tracker],
    orders: StandingOrders,
    hold: DiskHold,
    interrupts: Interrupts,
    pulse: Pulse,
) -> Outcome:
    """Start the pools, drive them, export; end everything whatever happens."""
    interrupts.cancel_here()
    journal.event("phase", phase="start")
    pulse.phase = "start"
    began = time.monotonic()
    with ray_for(spec, published_bytes(inputs.model_path, spec.rollout_dtype), run_dir / "logs"):
        rollouts, verifiers = RolloutPool(spec, str(inputs.model_path)), VerifierPool(spec.verifier)
        learner = LearnerGroup(spec, str(inputs.model_path))
        parts = Parts(
            rollouts=rollouts,
            verifiers=verifiers,
            learner=learner,
            payloads=RayPayloads(),
        )
        interrupts.cancel_here()  # again: Ray takes SIGTERM for itself
        beats = asyncio.create_task(pulse.beat(rollouts.activity, verifiers.activity, learner.activity))
        try:
            async with orders.heeded(orders.start_patience(has_checkpoint=checkpoint is not None)):
                with pulse.at("learner", "start", "starting"):
                    # The learner asks for its room first: rollout workers do with what is left.
                    await start_together(learner.start(), verifiers.start(), rollouts.start())
                await parts.learner.set_canary(inputs.canary)
            started = time.monotonic() - began
            journal.event("transition", state="running", attempt_seconds=round(started, 1))
            driver = Driver(
                spec=spec,
                objective=resolve(spec.algorithm, spec.rollout.max_new_tokens, spec.rollout.temperature),
                attempt=attempt,
                run_dir=run_dir,
                prompts=inputs.prompts,
                evaluation_prompts=inputs.evaluation,
                parts=parts,
                journal=journal,
                checkpoints=checkpoints,
                trackers=trackers,
                orders=orders,
                hold=hold,
                pulse=pulse,
            )
            forwarding = asyncio.create_task(_forward(rollouts.events, journal))
            try:
                outcome = await _driven(driver.run(checkpoint), rollouts.until_failed())
            finally:
                forwarding.cancel()
                while not rollouts.events.empty():  # the last loss of a worker may be what explains a failure
                    _worker_event(rollouts.events.get_nowait(), journal)
            outcome.seconds.update({"model": inputs.seconds, "start": started})
            if outcome.ending == "paused" or (outcome.ending == "cancelled" and orders.discard):
                return outcome

            async def exported() -> Outcome:
                with pulse.at("export", "export", "writing the trained model"):
                    return await export(
                        outcome, learner, inputs.model_path, run_dir / "export", journal, spec.deadlines.checkpoint_s
                    )

            try:
                return await hold.through(exported)
            except Ended:  # cancelled while the disk is full
                journal.event("condition", condition="NotExported", reason="the disk is full")
                return outcome
        finally:
            interrupts.ending()
            beats.cancel()
            await close_all(
                journal,
                rollouts=parts.rollouts.close(),
                verifiers=parts.verifiers.close(),
                learner=parts.learner.close(),
            )


async def _driven(driving: Coroutine[Any, Any, Outcome], failing: Coroutine[Any, Any, TrainingFailed]) -> Outcome:
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
