"""When the learner is lost: new ranks within the same attempt, from the newest checkpoint.

    a verb fails   a rank died or did not finish in time; the others were ended with it
    give up        nothing is issued; groups under way are dropped as `rolled_back`, their prompts come again
    restart        new ranks; rollout workers and verifiers stay up
    begin          the driver goes on as a resume does: weights and cursor of the checkpoint, `rollback` in the journal,
                   every worker attested anew, then the groups that were outstanding

What is published afterwards has versions of a new lineage, so nothing sampled before can be taken for it.

A job has RESTARTS of these, counted over attempts that follow each other by themselves, which is in the journal. A
resume that somebody asked for, after a pause or an end, has all of them again.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.checkpoint import Checkpoints
from sapo_ray.driver.course import Course
from sapo_ray.driver.intake import Intake
from sapo_ray.driver.parts import Learner
from sapo_ray.driver.state import complete_groups
from sapo_ray.errors import DeadlineExceeded, NoRoom, SapoRayError, TrainingFailed, WorkerLost

RESTARTS = 3
"""Of the learner, per job."""
LEARNER_LOST = "LearnerLost"
"""Condition while the learner is not there; what is counted."""
ASKED_FOR = ("paused", "cancelled", "failed", "succeeded")
"""Ends of attempts after which only somebody's wish goes on."""


class Recovery:
    """Brings the learner back; the course's lineage counts how often it did."""

    def __init__(
        self, attempt: Attempt, course: Course, learner: Learner, intake: Intake, checkpoints: Checkpoints
    ) -> None:
        self._course = course
        self._learner = learner
        self._intake = intake
        self._checkpoints = checkpoints
        self._journal = attempt.journal
        self._pulse = attempt.pulse
        self._losses: int | None = None
        """Of the job; not counted yet."""
        self._recovering = False

    async def after(self, error: SapoRayError) -> Path | None:
        """A learner that is there again, and the checkpoint to go on from; None: from the start.

        Raises:
            SapoRayError: `error` itself where it was not the learner that was lost.
            TrainingFailed: it was lost too often.
            WorkerLost: there are no nodes for a new one, within its deadline.
        """
        version = self._course.version  # the last of the lineage that ends
        while True:
            if not self._learner.lost:
                raise error
            await self._count(error)
            self._journal.event("phase", phase="recover", step=version.number)
            with self._pulse.at("checkpoint", "checkpoint", "looking for the newest checkpoint"):
                checkpoint = await asyncio.to_thread(self._checkpoints.newest)
            await self._intake.give_up(version, complete_groups(checkpoint) if checkpoint else frozenset())
            try:
                with self._pulse.at("learner", "start", "starting again", after=str(error)):
                    await self._learner.restart()
            except (WorkerLost, DeadlineExceeded) as again:
                error = again
            except NoRoom as gone:  # its node may be back for another attempt
                raise WorkerLost(f"the learner was lost and cannot be started again: {gone}") from gone
            else:
                self._course.lineage += 1
                return checkpoint

    def begun(self) -> None:
        """All workers have weights again: if this was a recovery, it is over."""
        if self._recovering:
            self._recovering = False
            reason = f"a new learner goes on from step {self._course.step}"
            self._journal.event("condition", condition=LEARNER_LOST, reason=reason, cleared=True)

    async def _count(self, error: SapoRayError) -> None:
        if self._losses is None:
            self._losses = 0
            if self._journal.attempt > 1:
                self._losses = await asyncio.to_thread(losses_before, self._journal.path, self._journal.attempt)
        self._losses += 1
        if self._losses > RESTARTS:
            raise TrainingFailed(
                f"the learner was lost {self._losses} times, and is restarted {RESTARTS} times in a job; the last "
                f"time: {error}; its newest checkpoint stays: `sapo-ray resume` goes on once the cause is mended"
            ) from error
        self._recovering = True
        self._journal.event(
            "condition", condition=LEARNER_LOST, reason=str(error), restart=self._losses, restarts=RESTARTS
        )


def losses_before(path: Path, attempt: int) -> int:
    """Learners that the attempts before `attempt` lost, since the last one that somebody asked for began."""
    losses = 0
    with path.open("rb") as lines:
        for line in lines:
            if b'"kind":"transition"' not in line and LEARNER_LOST.encode() not in line:
                continue
            event = json.loads(line)
            if event["attempt"] >= attempt:
                break
            if event["kind"] == "transition" and event["state"] in ASKED_FOR:
                losses = 0
            elif event["kind"] == "condition" and event["condition"] == LEARNER_LOST and not event.get("cleared"):
                losses += 1
    return losses
