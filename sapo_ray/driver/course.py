"""Where an attempt is, and what its time goes into. The loop, `Cuts` and `Recovery` count steps and
lineages, and whoever works in a phase its seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager

from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.waits import bounded
from sapo_ray.driver.window import Window
from sapo_ray.types import PolicyVersion


class Course:
    """Counts what the loop has done. `window` tells, of a wait that was too long, which groups were under way."""

    def __init__(self, attempt: Attempt, window: Window) -> None:
        self.step = 0
        """Steps taken."""
        self.updates = 0
        """Optimizer updates made, skipped ones left out."""
        self.lineage = 0
        """Learners lost within this attempt."""
        self.seconds: Counter[str] = Counter()
        """Spent in each phase."""
        self._number = attempt.number
        self._pulse = attempt.pulse
        self._window = window

    @property
    def version(self) -> PolicyVersion:
        """Of the weights that these steps lead to."""
        return PolicyVersion(self._number, self.step, self.lineage)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the body."""
        began, self._pulse.phase = time.monotonic(), name
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - began  # type: ignore[assignment]

    def bounded(self, what: str, seconds: float) -> AbstractAsyncContextManager[None]:
        """No wait is endless, and each says what it was for. Raises DeadlineExceeded."""

        def details() -> str:
            waiting = [entry.prompt.id for entry in self._window.waiting() if not entry.task.done()][:3]
            return f" at step {self.step}; groups under way: {waiting or 'none'}; see deadlines in the job"

        return bounded(seconds, what, details)
