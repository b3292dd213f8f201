"""How many rollout workers a job should have, from what its steps were like. Pure: no clock, no pool.

    synchronous   generation and training follow one another. The learner's wait is the generation, which more workers
                  shorten: aim at the number with which the wait is `wait` of a step.
    overlapped    generation runs ahead. Who waits tells which of the two bounds the step: the learner (more workers),
                  or the workers, which were busy for less than the step while whole batches lay ready (fewer).

Three things keep it from swinging. A band: nothing changes while the wait is between LOW and HIGH times what is wanted,
and fewer workers are only tried where they would still be within it. Patience: a decision needs the median of several
steps that saw one number of workers only, and twice as many after each change of direction. Proof: where more workers
did not help, because single completions are what takes so long, they are given back, and it is not tried again for a
while.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from statistics import median

HIGH, LOW = 1.5, 0.5
"""Bounds of the band, as multiples of the wait that is wanted."""
BUSY = 0.85
"""Share of a step for which workers should be busy, in overlapped training that the learner bounds."""
TOLERANCE = 0.15
"""Share of the workers below which it is not worth removing some."""
HELPED = 0.2
"""Of the gain that more workers promised; what brought less is given back."""
MOST_PATIENCE = 16
"""Multiples of the steps that a decision needs."""
PROOF_HOLDS = 20
"""Decisions for which more workers are not tried again after they did not help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """What one step was like."""

    seconds: float
    """From the end of the step before, when the workers had its weights, to the end of this one; evaluations and
    checkpoints in between included."""
    waited: float
    """Seconds of it in which the learner waited for completions."""
    busy: float
    """Seconds of it in which completions were under way."""
    ready_batches: float
    """Batches' worth of groups that were complete when the learner asked."""

    @property
    def wait_share(self) -> float:
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    @property
    def busy_share(self) -> float:
        return min(1.0, self.busy / self.seconds) if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Another number of workers."""

    workers: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Growth:
    """More workers, and what they were to bring."""

    before: int
    wait: float
    gain: float
    """Share of a step."""


class Autoscaler:
    """Chooses the number of workers of one attempt.

    Args:
        overlapped: max_staleness is above 0.
        wait: share of a step that the learner should wait for completions.
        steps: measured for each decision.
    """

    def __init__(self, *, overlapped: bool, wait: float, steps: int) -> None:
        self._overlapped = overlapped
        self._wait = wait
        self._steps = steps
        self._loads: list[StepLoad] = []
        self._patience = 1
        self._direction = 0
        self._growth: _Growth | None = None
        self._ceiling: int | None = None
        self._held = 0
        """Steps for which the ceiling still holds."""

    def changed(self) -> None:
        """The number of workers changes, whoever decided it: what was measured before counts no more."""
        self._loads.clear()

    def observe(self, load: StepLoad) -> None:
        """Take a step into account, during which the number of workers did not change."""
        self._held = max(0, self._held - 1)
        self._loads = [*self._loads, load][-self._steps * MOST_PATIENCE :]

    def decide(self, workers: int, least: int, most: int) -> Decision | None:
        """Another number than `workers`, all of which were there, within [least, most]; None to stay."""
        if len(self._loads) < self._steps * self._patience:
            return None
        recent = self._loads[-self._steps * self._patience :]
        wait = median(load.wait_share for load in recent)
        if decision := self._give_back(workers, least, wait):
            return decision
        aim = self._aim(workers, wait, recent)
        if self._held and self._ceiling is not None:
            most = min(most, max(self._ceiling, workers))
        aim = min(max(aim, least, ceil(workers / 2)), most, 2 * workers)
        if aim == workers:
            return None
        self._turn(1 if aim > workers else -1)
        self._growth = _Growth(before=workers, wait=wait, gain=wait - self._wait_with(workers, aim, wait))
        if aim < workers:
            self._growth = None
        return Decision(workers=aim, reason=self._reason(wait, recent))

    def _aim(self, workers: int, wait: float, recent: list[StepLoad]) -> int:
        if wait > HIGH * self._wait:
            return max(workers + 1, ceil(workers * self._workload(wait) - 1e-9))
        if wait >= LOW * self._wait or workers == 1:
            return workers
        if not self._overlapped:
            return (
                min(workers - 1, ceil(workers * self._workload(wait) - 1e-9))
                if self._may_do(workers, wait)
                else workers
            )
        if min(load.ready_batches for load in recent[-self._steps :]) < 1:
            return workers
        busy = median(load.busy_share for load in recent)
        enough = ceil(workers * busy / BUSY - 1e-9)
        return enough if enough <= workers * (1 - TOLERANCE) else workers

    def _workload(self, wait: float) -> float:
        """What the present number of workers is to be multiplied by for the wait that is wanted."""
        wait = min(wait, 0.99)
        if self._overlapped:  # the step is as long as the generation, and training takes what is not waited for
            return (1 - self._wait) / (1 - wait)
        return wait / (1 - wait) * (1 - self._wait) / self._wait

    def _may_do(self, workers: int, wait: float) -> bool:
        """Whether one worker fewer would leave the wait within the band."""
        return self._wait_with(workers, workers - 1, wait) <= self._wait

    def _wait_with(self, workers: int, others: int, wait: float) -> float:
        """The wait's share with another number of workers, were generation to take time as 1 / workers."""
        generation = workers / others
        if self._overlapped:
            return max(0.0, 1 - (1 - wait) / generation)
        return wait * generation / (wait * generation + 1 - wait)

    def _give_back(self, workers: int, least: int, wait: float) -> Decision | None:
        """Take workers back that were added and did not help."""
        growth, self._growth = self._growth, None
        if growth is None or growth.before >= workers or growth.wait - wait >= HELPED * growth.gain:
            return None
        back = max(least, growth.before)
        if back >= workers:
            return None
        self._ceiling, self._held = back, self._steps * PROOF_HOLDS
        self._turn(-1)
        return Decision(
            workers=back,
            reason=f"{workers} workers left the learner waiting for {wait:.0%} of a step, as {back} did "
            f"({growth.wait:.0%}): single completions are what takes so long",
        )

    def _turn(self, direction: int) -> None:
        """Each change of direction asks for more patience."""
        turned = self._direction not in (0, direction)
        self._patience = min(MOST_PATIENCE, 2 * self._patience) if turned else max(1, self._patience // 2)
        self._direction = direction

    def _reason(self, wait: float, recent: list[StepLoad]) -> str:
        words = f"the learner waited for completions for {wait:.0%} of a step, {self._wait:.0%} is wanted"
        if self._overlapped and wait < self._wait:
            busy = median(load.busy_share for load in recent)
            return f"{words}, and the workers were busy for {busy:.0%}"
        return words
