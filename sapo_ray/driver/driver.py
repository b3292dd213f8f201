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
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ray.exceptions import RayError

from sapo_ray.algorithms.settings import Objective
from sapo_ray.config.load import spec_hash
from sapo_ray.config.spec import JobSpec
from sapo_ray.diagnosis.vitals import POOL
from sapo_ray.driver.batch import Batch, batch_metrics, sample_rows, stale_by_length
from sapo_ray.driver.checkpoint import Checkpoints
from sapo_ray.driver.collector import Collector
from sapo_ray.driver.evaluation import Evaluation, evaluate, evaluation_settings
from sapo_ray.driver.guard import Guard
from sapo_ray.driver.hold import DiskHold
from sapo_ray.driver.intake import Intake
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.orders import Ended, Ending, StandingOrders
from sapo_ray.driver.parts import Learner, Payloads, Prompts, Rollouts, Tracker, Verifiers
from sapo_ray.driver.pulse import Pulse
from sapo_ray.driver.recovery import Recovery
from sapo_ray.driver.rundir import stop_if_superseded
from sapo_ray.driver.scaling import LoadMeter, Scaling
from sapo_ray.driver.state import DriverState, complete_groups, restore_window, save_state
from sapo_ray.driver.waits import beside, bounded
from sapo_ray.errors import DeadlineExceeded, TrainingFailed, WorkerLost
from sapo_ray.types import DropReason, PolicyVersion, Prompt, Published

ERROR_RATE_CONDITION = 0.05
STALE_RATE_CONDITION = 0.01
GRACE_S = 30.0
"""The parts bound their own waits and say more about them; the driver's bound is later by this."""


Cut = tuple[DriverState, Path] | None
"""What a checkpoint holds of the driver, and where it lies; None: the start of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The pools a driver runs."""

    rollouts: Rollouts
    verifiers: Verifiers
    learner: Learner
    payloads: Payloads


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run achieved until it ended."""

    ending: Ending | None
    """The order that ended it before its last step, if one did."""
    abandoned: bool
    """That order did not wait for the step under way; its learner is gone."""
    steps: int
    before: Evaluation | None
    after: Evaluation | None
    seconds: dict[str, float]
    published: Published
    export: Path | None = None
    """Where the published weights were written for others."""
    output: str | None = None
    """Where they were copied to, if the job wants it."""


class Driver:
    """Runs one attempt of one job."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        objective: Objective,
        attempt: int,
        run_dir: Path,
        prompts: Prompts,
        evaluation_prompts: list[Prompt],
        parts: Parts,
        journal: Journal,
        checkpoints: Checkpoints,
        trackers: list[Tracker],
        orders: StandingOrders,
        hold: DiskHold,
        pulse: Pulse | None = None,
    ) -> None:
        self._spec = spec
        self._attempt = attempt
        self._run_dir = run_dir
        self._prompts = prompts
        self._evaluation_prompts = evaluation_prompts
        self._parts = parts
        self._journal = journal
        self._checkpoints = checkpoints
        self._trackers = trackers
        self._orders = orders
        self._hold = hold
        self._pulse = pulse or Pulse()
        self._collector = Collector(spec, parts.rollouts, parts.verifiers, journal, self._pulse)
        self._intake = Intake(
            spec=spec, objective=objective, prompts=prompts, collector=self._collector, journal=journal
        )
        self._guard = Guard(spec.guard, spec.rollout.max_staleness)
        self._recovery = Recovery(parts.learner, self._intake, checkpoints, journal, self._pulse)
        self._first_prompts = prompts.state()
        self._step = self._updates = 0
        self._published: Published | None = None
        self._before: Evaluation | None = None
        self._seconds: Counter[str] = Counter()
        self._scaling = Scaling(
            spec=spec,
            orders=self._orders,
            rollouts=parts.rollouts,
            journal=journal,
            changed=self._collector.room_changed,
        )
        self._load = LoadMeter(self._seconds, self._collector, self._intake.window, spec.rollout.prompts_per_step)
        self._evaluation_metrics: dict[str, float] = {}
        self._beyond: set[str] = set()
        """Conditions of rates that stand."""

    async def run(self, checkpoint: Path | None) -> Outcome:
        """Train to the last step, from the start or from `checkpoint`; or until an order ends it before that."""
        async with beside(self._scaling.run(), "scaling"):
            return await self._run(checkpoint)

    async def _run(self, checkpoint: Path | None) -> Outcome:
        ending: Ending | None
        after, abandoned = None, False
        try:
            cut = await self._begin(checkpoint)
            try:
                async with self._orders.heeded(self._orders.step_patience):
                    ending = await self._train_on(cut)
                    if ending is None:
                        after = await self._finish()
            except Ended as order:  # the step under way was abandoned
                ending, abandoned = order.state, True
            assert self._published is not None
            return Outcome(
                ending=ending,
                abandoned=abandoned,
                steps=self._published.manifest.version.number,
                before=self._comparable_before(),
                after=after,
                seconds=dict(self._seconds),
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
        self._journal.event("phase", phase="train", step=self._step, steps=self._spec.steps)
        while self._step < self._spec.steps and self._orders.ending != "cancelled":
            self._stop_if_superseded()
            began = time.monotonic()
            self._load.begin()
            batch = await self._next_batch()
            metrics = await self._train(batch)
            metrics |= await self._publish()
            metrics["seconds/step"] = time.monotonic() - began
            metrics |= self._scaling.step(self._load.end())
            self._intake.window.release()
            pausing = self._orders.ending == "paused" and self._step < self._spec.steps
            if not pausing:
                self._intake.fill(self._version())
            await self._evaluate_if_due()
            await self._record(batch, metrics)
            if pausing:
                return await self._pause()
            await self._checkpoint_if_due()
        return "cancelled" if self._orders.ending == "cancelled" else None

    async def _finish(self) -> Evaluation | None:
        """After the last step: what came of it."""
        if self._updates == 0:
            raise TrainingFailed("no optimizer update was made: each had a gradient that was not finite")
        after = await self._evaluate("evaluate_after", sampled=True)
        for tracker in self._trackers[1:]:  # metrics.jsonl has one row a step; its last one is written
            await self._hold.call(partial(tracker.log, self._step, self._evaluation_metrics))
        return after

    def _comparable_before(self) -> Evaluation | None:
        """A resume may change what is evaluated; then the accuracy before training is that of something else."""
        if self._before is None or self._before.compares_with(evaluation_settings(self._spec)):
            return self._before
        reason = "evaluation.* changed since the accuracy before training was measured: there is none to compare with"
        self._journal.event("condition", condition="NotComparable", reason=reason)
        return None

    async def _pause(self) -> Ending:
        """Nothing more is issued; what still runs may finish, and is kept in the checkpoint."""
        running = [entry.task for entry in self._intake.window.waiting()]
        self._journal.event("phase", phase="pause", step=self._step, groups=len(running))
        if running:
            with self._phase("generation"):
                await asyncio.wait(running, timeout=self._spec.rollout.group_deadline_s)
        await self._checkpoint()
        return "cancelled" if self._orders.ending == "cancelled" else "paused"

    def _stop_if_superseded(self) -> None:
        stop_if_superseded(self._run_dir, self._attempt)

    # --- beginning -------------------------------------------------------------------------------------------------

    async def _begin(self, checkpoint: Path | None) -> Cut:
        """Initial or restored weights to all workers: nothing is issued under others."""
        rollout = self._spec.rollout
        self._journal.ledger(  # for whoever reads the journal alone
            "bounds",
            steps=self._spec.steps,
            prompts=rollout.prompts_per_step,
            group_size=rollout.group_size,
            max_staleness=rollout.max_staleness,
            keep=self._spec.checkpoint.keep,
        )
        try:
            cut = await self._restore(checkpoint)
            # What an earlier attempt, or lineage, consumed after this step is void, also if there is no checkpoint.
            if self._attempt > 1 or self._recovery.lineage:
                name = checkpoint and checkpoint.name
                self._journal.event("rollback", to_step=self._step, checkpoint=name, version=str(self._version()))
            if self._recovery.lineage:
                self._guard.rewind(self._step)
                for tracker in self._trackers:
                    await self._hold.call(partial(tracker.rewind, self._step))
            await self._publish()
        except (WorkerLost, DeadlineExceeded) as error:
            return await self._begin_again(error)
        self._recovery.begun(self._version())
        return cut

    async def _begin_again(self, error: WorkerLost | DeadlineExceeded) -> Cut:
        """With a new learner, from its newest checkpoint; raises `error` if it was not the learner that was lost."""
        with self._phase("recovery"):
            checkpoint = await self._recovery.after(error, self._version())
        self._stop_if_superseded()  # restarting took a while, and what follows takes rows of metrics back
        return await self._begin(checkpoint)

    async def _restore(self, checkpoint: Path | None) -> Cut:
        """What the driver and the learner were at a checkpoint, or at the start."""
        if checkpoint is None:
            self._step = self._updates = 0
            self._prompts.restore(self._first_prompts)
            self._evaluation_metrics = {} if self._before is None else self._before.metrics()
            return None
        with self._phase("restore"):
            state = DriverState.read(checkpoint, self._prompts.fingerprint, spec_hash(self._spec))
            with self._pulse.at("learner", "restore", f"loading {checkpoint.name}"):
                await self._parts.learner.load(checkpoint / "learner")
        self._step = state.step
        self._before = state.before
        self._updates = state.updates
        self._evaluation_metrics = {}
        if not self._recovery.lineage:
            self._seconds.update(state.seconds)
        self._prompts.restore(state.prompts)
        return state, checkpoint

    async def _issue_first(self, cut: Cut) -> None:
        """The groups that were outstanding at the cut, in their order, then new ones."""
        if cut is None:
            self._before = self._before or await self._evaluate("evaluate_before", sampled=True)
        else:
            self._intake.allow(
                self._spec.rollout.max_staleness
            )  # all that was outstanding, whatever the guard says by now
            await restore_window(*cut, self._intake.window, self._parts.payloads, self._intake.collect)
            self._intake.allow(self._guard.ahead)
            kept = complete_groups(cut[1])
            for prompt in (entry.prompt for entry in self._intake.window.waiting()):
                complete = prompt.id in kept
                self._journal.ledger("issued", group=prompt.id, index=prompt.index, restored=True, complete=complete)
        self._intake.fill(self._version())

    # --- one step --------------------------------------------------------------------------------------------------

    async def _next_batch(self) -> Batch:
        """The next groups in issue order; what cannot be used is dropped on the way."""
        with self._phase("generation"):
            async with self._bounded("the next batch of graded groups", self._spec.deadlines.batch_s):
                with self._pulse.at(POOL, "sample", f"the groups of step {self._step + 1}"):
                    return await self._intake.next_batch(self._version())

    async def _train(self, batch: Batch) -> dict[str, float]:
        """One learner step: all its updates. Afterwards the batch is consumed."""
        with self._phase("training"):
            async with self._bounded("the learner's step", self._spec.deadlines.step_s + GRACE_S):
                with self._pulse.at("learner", "train", f"training step {self._step + 1}"):
                    report = await self._parts.learner.train(self._step + 1, list(batch.samples))
        metrics = batch_metrics(batch, self._intake.examined, self._spec, self._step)
        self._step += 1
        self._updates += report.updates
        self._intake.drop_samples(report.dropped, self._step)
        self._intake.window.trained()
        self._journal.ledger("consumed", step=self._step, groups=batch.advantages_by_group(set(report.dropped)))
        return metrics | dict(report.metrics)

    async def _publish(self) -> dict[str, float]:
        """Give the learner's weights a version and bring every worker to it."""
        before = self._seconds["publish"]
        with self._phase("publish"):
            async with self._bounded(
                "publishing weights and the workers' takeover", 2 * self._spec.deadlines.publish_s + GRACE_S
            ):
                receivers = self._parts.rollouts.push_targets()
                try:
                    with self._pulse.at("learner", "publish", f"publishing weights {self._version()}"):
                        self._published = await self._parts.learner.publish(self._version(), receivers)
                except (WorkerLost, DeadlineExceeded):
                    self._parts.rollouts.push_failed()
                    raise
                with self._pulse.at(POOL, "takeover", f"taking weights {self._version()} over"):
                    takeovers = await self._parts.rollouts.update(self._published)
        self._journal.ledger(
            "published",
            version=str(self._version()),
            fingerprint=self._published.manifest.fingerprint,
            workers=[takeover.worker for takeover in takeovers],
        )
        return {
            "publish/seconds": self._seconds["publish"] - before,
            "publish/canary_max": max((takeover.canary_max for takeover in takeovers), default=0.0),
            "rollout/workers": float(len(takeovers)),
        }

    def _version(self) -> PolicyVersion:
        return PolicyVersion(self._attempt, self._step, self._recovery.lineage)

    # --- after a step ----------------------------------------------------------------------------------------------

    async def _record(self, batch: Batch, metrics: dict[str, float]) -> None:
        """Metrics, conditions and the journal, durable before the next step."""
        metrics |= self._evaluation_metrics
        self._evaluation_metrics = {}
        metrics |= {f"drops/{reason}": float(self._intake.drops[reason]) for reason in DropReason}
        metrics |= stale_by_length(self._intake.stale, self._spec.rollout.max_new_tokens)
        metrics |= {f"seconds/all_{phase}": seconds for phase, seconds in self._seconds.items()}
        metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / metrics["seconds/step"]
        self._watch_rate("VerifierErrors", metrics["verifier/error_rate"], ERROR_RATE_CONDITION)
        if skipped := metrics.get("learner/nonfinite_updates"):
            self._journal.event("condition", condition="NonfiniteUpdates", step=self._step, skipped=int(skipped))
        metrics["rollout/ahead"] = float(self._guard.ahead)
        for condition in self._guard.look(self._step, metrics):
            self._journal.event("condition", **condition)
        self._intake.allow(self._guard.ahead)
        stale = self._intake.drops[DropReason.STALE] / self._spec.rollout.prompts_per_step
        self._watch_rate("StaleDrops", stale, STALE_RATE_CONDITION)
        for tracker in self._trackers:
            await self._hold.call(partial(tracker.log, self._step, metrics))
        with self._pulse.at("storage", "write", "keeping samples"):
            await self._keep_samples(batch)
        drops = {str(reason): count for reason, count in self._intake.drops.items()}
        said = {"step": self._step, "steps": self._spec.steps, "version": str(self._version())}
        self._journal.event("step", **said, drops=drops, metrics=metrics)
        await self._hold.through(self._sync)

    def _watch_rate(self, condition: str, rate: float, bound: float) -> None:
        """A condition of the steps whose rate is beyond its bound; the first that is within takes it back."""
        if rate > bound:
            self._beyond.add(condition)
            self._journal.event("condition", condition=condition, rate=rate)
        elif condition in self._beyond:
            self._beyond.remove(condition)
            self._journal.event("condition", condition=condition, rate=rate, cleared=True)

    async def _sync(self) -> None:
        with self._pulse.at("storage", "write", "making the journal durable"):
            await self._journal.sync()

    async def _keep_samples(self, batch: Batch) -> None:
        """Texts of the first groups of the batch, for people to read."""
        groups = batch.groups[: self._spec.logging.sample_groups]
        rows = [{"step": self._step, "attempt": self._attempt, **row} for row in sample_rows(groups)]
        if not rows:
            return
        try:
            async with asyncio.timeout(GRACE_S):
                await self._parts.payloads.log_texts(
                    self._run_dir / "samples.jsonl", rows, [c.payload for group in groups for c in group.completions]
                )
        except (TimeoutError, OSError, RayError) as error:  # texts are for people: the step was trained without them
            self._journal.event("condition", condition="SamplesNotKept", reason=str(error) or "nothing within 30 s")

    async def _checkpoint_if_due(self) -> None:
        every = self._spec.checkpoint.every
        last = self._step == self._spec.steps
        if last or (every and self._step % every == 0) or self._orders.checkpoint_request():
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        request = self._orders.checkpoint_request()
        folder = await self._hold.through(self._write_checkpoint)
        self._orders.checkpoint_made(request)
        self._journal.event("checkpoint", step=self._step, name=folder.name)
        await self._hold.through(self._sync)

    async def _write_checkpoint(self) -> Path:
        with self._phase("checkpoint"):
            async with self._bounded("the checkpoint", self._spec.deadlines.checkpoint_s + GRACE_S):
                with self._pulse.at("checkpoint", "checkpoint", f"writing the checkpoint of step {self._step}"):
                    return await self._checkpoints.write(self._step, self._fill_checkpoint, self._stop_if_superseded)

    async def _fill_checkpoint(self, folder: Path) -> None:
        """The cut after a publish: what the run needs to go on from here as if nothing had happened."""
        await self._parts.learner.save(folder / "learner")
        state = DriverState(
            step=self._step,
            prompts=self._prompts.state(),
            data_fingerprint=self._prompts.fingerprint,
            before=self._before,
            spec_hash=spec_hash(self._spec),
            updates=self._updates,
            seconds=dict(self._seconds),
        )
        await save_state(state, folder, self._intake.window, self._parts.payloads)
        await self._journal.sync()  # what the checkpoint stands on is durable before the checkpoint is visible

    async def _evaluate_if_due(self) -> None:
        every = self._spec.evaluation.every
        if every and self._step % every == 0 and self._step < self._spec.steps:
            await self._evaluate("evaluate", sampled=False)

    async def _evaluate(self, phase: str, *, sampled: bool) -> Evaluation | None:
        """Held-out accuracy; the weights do not change meanwhile, because the loop that changes them waits here."""
        if not self._evaluation_prompts:
            return None
        self._journal.event("phase", phase=phase, step=self._step, prompts=len(self._evaluation_prompts))
        with self._phase("evaluation"):
            async with self._bounded("the evaluation", self._spec.deadlines.evaluation_s):
                evaluation = await evaluate(
                    self._collector,
                    self._evaluation_prompts,
                    self._spec,
                    step=self._step,
                    version=str(self._version()),
                    sampled=sampled,
                )
        self._journal.event("evaluation", **evaluation.as_dict())
        self._evaluation_metrics = evaluation.metrics()
        return evaluation

    # --- waits -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Count the seconds spent in a phase."""
        began, self._pulse.phase = time.monotonic(), name
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began  # type: ignore[assignment]

    def _bounded(self, what: str, seconds: float) -> AbstractAsyncContextManager[None]:
        """No wait is endless, and each says what it was for."""

        def details() -> str:
            waiting = [entry.prompt.id for entry in self._intake.window.waiting() if not entry.task.done()][:3]
            return f" at step {self._step}; groups under way: {waiting or 'none'}; see deadlines in the job"

        return bounded(seconds, what, details)
