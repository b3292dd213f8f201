"""Cuts of a run after a publish: what it needs to go on from there as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

from sapo_ray.config.load import spec_hash
from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.checkpoint import Checkpoints
from sapo_ray.driver.course import Course
from sapo_ray.driver.heldout import HeldOut
from sapo_ray.driver.intake import Intake
from sapo_ray.driver.parts import Parts, Prompts
from sapo_ray.driver.state import DriverState, complete_groups, restore_window, save_state
from sapo_ray.driver.waits import GRACE_S
from sapo_ray.errors import PayloadLost

Cut = tuple[DriverState, Path] | None
"""What a checkpoint holds of the driver, and where it lies; None: the start of the run."""


class Cuts:
    """Writes checkpoints, and takes an attempt back to one."""

    def __init__(
        self,
        attempt: Attempt,
        course: Course,
        checkpoints: Checkpoints,
        prompts: Prompts,
        intake: Intake,
        held_out: HeldOut,
        parts: Parts,
    ) -> None:
        self._attempt = attempt
        self._course = course
        self._checkpoints = checkpoints
        self._prompts = prompts
        self._first_prompts = prompts.state()
        self._intake = intake
        self._held_out = held_out
        self._learner = parts.learner
        self._payloads = parts.payloads

    async def take_if_due(self) -> None:
        """After every `checkpoint.every` steps, after the last, and whenever somebody asks for one."""
        spec, step = self._attempt.spec, self._course.step
        due = spec.checkpoint.every and step % spec.checkpoint.every == 0
        if due or step == spec.steps or self._attempt.orders.checkpoint_request():
            await self.take()

    async def take(self) -> None:
        """A checkpoint of this moment, which follows a publish. Raises as the hold does."""
        request = self._attempt.orders.checkpoint_request()
        folder = await self._attempt.hold.through(self._write)
        self._attempt.orders.checkpoint_made(request)
        self._attempt.journal.event("checkpoint", step=self._course.step, name=folder.name)
        await self._attempt.sync()

    async def go_back(self, checkpoint: Path | None) -> Cut:
        """Driver and learner as they were at a checkpoint, or at the start; `restore_groups` is still to come."""
        if checkpoint is None:
            self._course.step = self._course.updates = 0
            self._prompts.restore(self._first_prompts)
            self._held_out.restarted()
            return None
        with self._course.phase("restore"):
            state = DriverState.read(checkpoint, self._prompts.fingerprint, spec_hash(self._attempt.spec))
            if not self._course.lineage:  # before the learner may be lost once more, while it loads
                self._course.seconds.update(state.seconds)
            with self._attempt.pulse.at("learner", "restore", f"loading {checkpoint.name}"):
                await self._learner.load(checkpoint / "learner")
        self._course.step, self._course.updates = state.step, state.updates
        self._held_out.restored(state.before)
        self._prompts.restore(state.prompts)
        return state, checkpoint

    async def restore_groups(self, state: DriverState, checkpoint: Path) -> None:
        """The groups that were outstanding at the cut, in their order: complete ones as they are."""
        await restore_window(state, checkpoint, self._intake.window, self._payloads, self._intake.collect)
        kept = complete_groups(checkpoint)
        for prompt in (entry.prompt for entry in self._intake.window.waiting()):
            self._attempt.journal.ledger(
                "issued", group=prompt.id, index=prompt.index, restored=True, complete=prompt.id in kept
            )

    async def _write(self) -> Path:
        step = self._course.step
        with self._course.phase("checkpoint"):
            async with self._course.bounded("the checkpoint", self._attempt.spec.deadlines.checkpoint_s + GRACE_S):
                with self._attempt.pulse.at("checkpoint", "checkpoint", f"writing the checkpoint of step {step}"):
                    return await self._checkpoints.write(step, self._fill, self._attempt.stop_if_superseded)

    async def _fill(self, folder: Path) -> None:
        await self._learner.save(folder / "learner")
        state = DriverState(
            step=self._course.step,
            prompts=self._prompts.state(),
            data_fingerprint=self._prompts.fingerprint,
            before=self._held_out.before,
            spec_hash=spec_hash(self._attempt.spec),
            updates=self._course.updates,
            seconds=dict(self._course.seconds),
        )
        while True:
            try:
                await save_state(state, folder, self._intake.window, self._payloads)
                break
            except PayloadLost:
                if not await self._intake.ask_again(self._payloads):
                    raise
        await self._attempt.journal.sync()  # what the checkpoint stands on is durable before it is visible
