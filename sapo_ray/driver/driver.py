"""The driver: one loop from prompts to weights. Read this first.

    PromptSource --> window of outstanding groups --> next batch --> learner --> publish --> workers
                        |  one Collector task each        |             |           |          |
                        |  (rollout, then verifier)       |             |           |          |
                        ^                                 |             |           |          |
                        +------- slots given back once the workers have taken over ------------+

    who             consumes              produces            waits for                     is unblocked by
    Intake          prompts, free slots   outstanding groups  a free slot                   _publish, a drop
    Collector       one prompt            one graded group    a worker, then a verifier     the pools
    _next_batch     graded groups         a Batch             the next group in issue order Collector
    _train          a Batch               new weights         the learner                   the learner
    _publish        new weights           a version           the workers' takeover         the rollout pool
    _pause          running groups        a checkpoint        them, within their deadline   the rollout pool
    Recovery        a lost learner        a new one           its ranks                     the cluster
    DiskHold        a full disk           the same write      room on the disk              whoever frees some

`max_staleness` is only the number of slots: (max_staleness + 1) batches. With 0, nothing is generated while the learner
works and every sample is on-policy; with k, generation runs k batches ahead. There is no second loop.
Orders of a control plane (orders.py) are looked at between the end of one step and the issue for the next. How many
workers there are is nothing to the loop: scaling.py adds and removes them beside it.

The driver sees ids, lengths, versions, rewards and refs; tokens and tensors never pass through it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from sapo_ray.diagnosis.vitals import POOL
from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.batch import Batch, batch_metrics
from sapo_ray.driver.checkpoint import Checkpoints
from sapo_ray.driver.collector import Collector
from sapo_ray.driver.course import Course
from sapo_ray.driver.cuts import Cut, Cuts
from sapo_ray.driver.evaluation import Evaluation
from sapo_ray.driver.guard import Guard
from sapo_ray.driver.heldout import HeldOut
from sapo_ray.driver.intake import Intake
from sapo_ray.driver.orders import Ended, Ending
from sapo_ray.driver.parts import Material, Parts, Tracker
from sapo_ray.driver.recording import Recording
from sapo_ray.driver.recovery import Recovery
from sapo_ray.driver.result import Outcome
from sapo_ray.driver.scaling import LoadMeter, Scaling
from sapo_ray.driver.waits import GRACE_S, beside
from sapo_ray.errors import DeadlineExceeded, PayloadLost, TrainingFailed, WorkerLost
from sapo_ray.types import Published


class Driver:
    """Runs one attempt of one job."""

    def __init__(
        self,
        attempt: Attempt,
        material: Material,
        parts: Parts,
        checkpoints: Checkpoints,
        trackers: list[Tracker],
    ) -> None:
        spec, journal = attempt.spec, attempt.journal
        self._attempt = attempt
        self._spec = spec
        self._journal = journal
        self._orders = attempt.orders
        self._pulse = attempt.pulse
        self._parts = parts
        self._collector = Collector(spec, parts.rollouts, parts.verifiers, journal, attempt.pulse)
        self._intake = Intake(
            spec=spec,
            objective=material.objective,
            prompts=material.prompts,
            collector=self._collector,
            journal=journal,
        )
        self._course = Course(attempt, self._intake.window)
        self._guard = Guard(spec.guard, spec.rollout.max_staleness)
        self._held_out = HeldOut(attempt, self._course, self._collector, material.evaluation)
        self._recording = Recording(attempt, self._course, self._intake, trackers, parts.payloads)
        self._recovery = Recovery(attempt, self._course, parts.learner, self._intake, checkpoints)
        self._cuts = Cuts(attempt, self._course, checkpoints, material.prompts, self._intake, self._held_out, parts)
        self._scaling = Scaling(
            spec=spec,
            orders=attempt.orders,
            rollouts=parts.rollouts,
            journal=journal,
            changed=self._collector.room_changed,
        )
        self._load = LoadMeter(
            self._course.seconds, self._collector, self._intake.window, spec.rollout.prompts_per_step
        )
        self._published: Published | None = None
        self._under_way = False
        """A step is: it has begun, and its weights are not with the workers yet."""

    async def run(self, checkpoint: Path | None) -> Outcome:
        """Train to the last step, from the start or from `checkpoint`; or until an order ends it before that."""
        async with beside(self._scaling.run(), "scaling"):
            return await self._run(checkpoint)

    async def _run(self, checkpoint: Path | None) -> Outcome:
        ending: Ending | None
        after = None
        try:
            async with self._orders.heeded(self._orders.start_patience(has_checkpoint=checkpoint is not None)):
                cut = await self._begin(checkpoint)
            try:
                async with self._orders.heeded(self._orders.step_patience):
                    ending = await self._train_on(cut)
                    if ending is None:
                        after = await self._finish()
            except Ended as order:
                ending = order.state
            assert self._published is not None
            return Outcome(
                ending=ending,
                abandoned=self._under_way,
                steps=self._published.manifest.version.number,
                before=self._held_out.comparable(),
                after=after,
                seconds=dict(self._course.seconds),
                published=self._published,
            )
        finally:
            await self._intake.window.cancel()

    async def _train_on(self, cut: Cut) -> Ending | None:
        """From a cut to the last step or an order; wherever the learner is lost, from the newest checkpoint again."""
        while True:
            try:
                await self._issue_first(cut)
                return await self._take_steps()
            except (WorkerLost, DeadlineExceeded) as error:
                cut = await self._begin_again(error)

    async def _take_steps(self) -> Ending | None:
        """All steps, or those until an order ends the run; returns that order."""
        course, orders = self._course, self._orders
        self._journal.event("phase", phase="train", step=course.step, steps=self._spec.steps)
        while course.step < self._spec.steps and orders.ending != "cancelled":
            self._attempt.stop_if_superseded()
            began = time.monotonic()
            self._load.begin()
            self._under_way = True
            batch, metrics = await self._train_on_next()
            metrics |= await self._publish()
            self._under_way = False
            metrics["seconds/step"] = time.monotonic() - began
            metrics |= self._scaling.step(self._load.end())
            self._intake.window.release()
            pausing = orders.ending == "paused" and course.step < self._spec.steps
            if not pausing:
                self._intake.fill(course.version)
            await self._held_out.if_due()
            await self._record(batch, metrics)
            if pausing:
                return await self._pause()
            await self._cuts.take_if_due()
        return "cancelled" if orders.ending == "cancelled" else None

    async def _finish(self) -> Evaluation | None:
        """After the last step: what came of it."""
        if self._course.updates == 0:
            raise TrainingFailed("no optimizer update was made: each had a gradient that was not finite")
        after = await self._held_out.last()
        await self._recording.add(self._held_out.take_metrics())
        return after

    async def _pause(self) -> Ending:
        """Nothing more is issued; what still runs may finish, and is kept in the checkpoint."""
        running = [entry.task for entry in self._intake.window.waiting()]
        self._journal.event("phase", phase="pause", step=self._course.step, groups=len(running))
        if running:
            with self._course.phase("generation"):
                await asyncio.wait(running, timeout=self._spec.rollout.group_deadline_s)
        await self._cuts.take()
        return "cancelled" if self._orders.ending == "cancelled" else "paused"

    # --- beginning -------------------------------------------------------------------------------------------------

    async def _begin(self, checkpoint: Path | None) -> Cut:
        """Initial or restored weights to all workers: nothing is issued under others."""
        self._recording.bounds()
        course = self._course
        try:
            cut = await self._cuts.go_back(checkpoint)
            # What an earlier attempt, or lineage, consumed after this step is void, also if there is no checkpoint.
            if self._attempt.number > 1 or course.lineage:
                name = checkpoint and checkpoint.name
                self._journal.event("rollback", to_step=course.step, checkpoint=name, version=str(course.version))
            if course.lineage:
                self._guard.rewind(course.step)
                await self._recording.rewind()
            await self._publish()
        except (WorkerLost, DeadlineExceeded) as error:
            return await self._begin_again(error)
        self._recovery.begun()
        return cut

    async def _begin_again(self, error: WorkerLost | DeadlineExceeded) -> Cut:
        """With a new learner, from its newest checkpoint; raises `error` if it was not the learner that was lost."""
        with self._course.phase("recovery"):
            checkpoint = await self._recovery.after(error)
        self._attempt.stop_if_superseded()  # restarting took a while, and what follows takes rows of metrics back
        return await self._begin(checkpoint)

    async def _issue_first(self, cut: Cut) -> None:
        """The groups that were outstanding at the cut, in their order, then new ones."""
        if cut is None:
            await self._held_out.first()
        else:
            # All that was outstanding, whatever the guard says by now.
            self._intake.allow(self._spec.rollout.max_staleness)
            await self._cuts.restore_groups(*cut)
            self._intake.allow(self._guard.ahead)
        self._intake.fill(self._course.version)

    async def _train_on_next(self) -> tuple[Batch, dict[str, float]]:
        """The next batch, and the step on it; again where samples of it were lost before the learner had them."""
        while True:
            batch = await self._next_batch()
            try:
                return batch, await self._train(batch)
            except PayloadLost:
                async with self._course.bounded("looking for lost samples", self._spec.deadlines.batch_s):
                    found = await self._intake.ask_again(self._parts.payloads, batch)
                if not found:
                    raise

    # --- one step --------------------------------------------------------------------------------------------------

    async def _next_batch(self) -> Batch:
        """The next groups in issue order; what cannot be used is dropped on the way."""
        course = self._course
        with course.phase("generation"):
            async with course.bounded("the next batch of graded groups", self._spec.deadlines.batch_s):
                with self._pulse.at(POOL, "sample", f"the groups of step {course.step + 1}"):
                    return await self._intake.next_batch(course.version)

    async def _train(self, batch: Batch) -> dict[str, float]:
        """One learner step: all its updates. Afterwards the batch is consumed."""
        course = self._course
        with course.phase("training"):
            async with course.bounded("the learner's step", self._spec.deadlines.step_s + GRACE_S):
                with self._pulse.at("learner", "train", f"training step {course.step + 1}"):
                    report = await self._parts.learner.train(course.step + 1, list(batch.samples))
        metrics = batch_metrics(batch, self._intake.examined, self._spec, course.step)
        course.step += 1
        course.updates += report.updates
        self._intake.drop_samples(report.dropped, course.step)
        self._intake.window.trained()
        self._journal.ledger("consumed", step=course.step, groups=batch.advantages_by_group(set(report.dropped)))
        return metrics | dict(report.metrics)

    async def _publish(self) -> dict[str, float]:
        """Give the learner's weights a version and bring every worker to it."""
        course, rollouts = self._course, self._parts.rollouts
        before, version = course.seconds["publish"], course.version
        with course.phase("publish"):
            async with course.bounded(
                "publishing weights and the workers' takeover", 2 * self._spec.deadlines.publish_s + GRACE_S
            ):
                receivers = rollouts.push_targets()
                try:
                    with self._pulse.at("learner", "publish", f"publishing weights {version}"):
                        self._published = await self._parts.learner.publish(version, receivers)
                except (WorkerLost, DeadlineExceeded):
                    rollouts.push_failed()
                    raise
                with self._pulse.at(POOL, "takeover", f"taking weights {version} over"):
                    takeovers = await rollouts.update(self._published)
        self._journal.ledger(
            "published",
            version=str(version),
            fingerprint=self._published.manifest.fingerprint,
            workers=[takeover.worker for takeover in takeovers],
        )
        return {
            "publish/seconds": course.seconds["publish"] - before,
            "publish/canary_max": max((takeover.canary_max for takeover in takeovers), default=0.0),
            "rollout/workers": float(len(takeovers)),
        }

    async def _record(self, batch: Batch, metrics: dict[str, float]) -> None:
        """The step is on record, and the guard has seen it, before the next one."""
        metrics |= self._held_out.take_metrics()
        metrics["rollout/ahead"] = float(self._guard.ahead)
        for condition in self._guard.look(self._course.step, metrics):
            self._journal.event("condition", **condition)
        self._intake.allow(self._guard.ahead)
        await self._recording.step(batch, metrics)
