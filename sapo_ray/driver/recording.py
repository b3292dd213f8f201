"""What is kept of a step: its metrics, the conditions of its rates, texts to read, its line in the journal."""

from __future__ import annotations

import asyncio
from functools import partial

from ray.exceptions import RayError

from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.batch import Batch, sample_rows, stale_by_length
from sapo_ray.driver.course import Course
from sapo_ray.driver.intake import Intake
from sapo_ray.driver.parts import Payloads, Tracker
from sapo_ray.types import DropReason

ERROR_RATE_CONDITION = 0.05
STALE_RATE_CONDITION = 0.01
SAMPLES_S = 30.0
"""Texts that take longer are left out."""


class Recording:
    """Writes steps down, durable before the next one begins."""

    def __init__(
        self, attempt: Attempt, course: Course, intake: Intake, trackers: list[Tracker], payloads: Payloads
    ) -> None:
        self._attempt = attempt
        self._course = course
        self._intake = intake
        self._trackers = trackers
        self._payloads = payloads
        self._beyond: set[str] = set()
        """Conditions of rates that stand."""

    def bounds(self) -> None:
        """What the ledger from here on must keep to, for whoever reads the journal alone."""
        spec = self._attempt.spec
        self._attempt.journal.ledger(
            "bounds",
            steps=spec.steps,
            prompts=spec.rollout.prompts_per_step,
            group_size=spec.rollout.group_size,
            max_staleness=spec.rollout.max_staleness,
            keep=spec.checkpoint.keep,
        )

    async def step(self, batch: Batch, metrics: dict[str, float]) -> None:
        """The step that was taken last."""
        spec, journal, step = self._attempt.spec, self._attempt.journal, self._course.step
        drops = self._intake.drops
        metrics |= {f"drops/{reason}": float(drops[reason]) for reason in DropReason}
        metrics |= stale_by_length(self._intake.stale, spec.rollout.max_new_tokens)
        metrics |= {f"seconds/all_{phase}": seconds for phase, seconds in self._course.seconds.items()}
        metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / metrics["seconds/step"]
        self._watch_rate("VerifierErrors", metrics["verifier/error_rate"], ERROR_RATE_CONDITION)
        self._watch_rate("StaleDrops", drops[DropReason.STALE] / spec.rollout.prompts_per_step, STALE_RATE_CONDITION)
        if skipped := metrics.get("learner/nonfinite_updates"):
            journal.event("condition", condition="NonfiniteUpdates", step=step, skipped=int(skipped))
        for tracker in self._trackers:
            await self._attempt.hold.call(partial(tracker.log, step, metrics))
        with self._attempt.pulse.at("storage", "write", "keeping samples"):
            await self._keep_samples(batch)
        said = {"step": step, "steps": spec.steps, "version": str(self._course.version)}
        journal.event("step", **said, drops={str(reason): count for reason, count in drops.items()}, metrics=metrics)
        await self._attempt.sync()

    async def rewind(self) -> None:
        """Rows of later steps than the one the run goes on from are void."""
        for tracker in self._trackers:
            await self._attempt.hold.call(partial(tracker.rewind, self._course.step))

    async def add(self, metrics: dict[str, float]) -> None:
        """What came after the last step, for all but metrics.jsonl: it has one row a step, and its last is written."""
        for tracker in self._trackers[1:]:
            await self._attempt.hold.call(partial(tracker.log, self._course.step, metrics))

    def _watch_rate(self, condition: str, rate: float, bound: float) -> None:
        """A condition of the steps whose rate is beyond its bound; the first that is within takes it back."""
        if rate > bound:
            self._beyond.add(condition)
            self._attempt.journal.event("condition", condition=condition, rate=rate)
        elif condition in self._beyond:
            self._beyond.remove(condition)
            self._attempt.journal.event("condition", condition=condition, rate=rate, cleared=True)

    async def _keep_samples(self, batch: Batch) -> None:
        """Texts of the first groups of the batch, for people to read."""
        groups = batch.groups[: self._attempt.spec.logging.sample_groups]
        made = {"step": self._course.step, "attempt": self._attempt.number, "version": str(self._course.version)}
        rows = [{**made, **row} for row in sample_rows(groups)]
        if not rows:
            return
        refs = [completion.payload for group in groups for completion in group.completions]
        try:
            async with asyncio.timeout(SAMPLES_S):
                await self._payloads.log_texts(self._attempt.run_dir / "samples.jsonl", rows, refs)
        except (TimeoutError, OSError, RayError) as error:  # texts are for people: the step was trained without them
            reason = str(error) or f"nothing within {SAMPLES_S:.0f} s"
            self._attempt.journal.event("condition", condition="SamplesNotKept", reason=reason)
