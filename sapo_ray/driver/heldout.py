"""The evaluations of a run: before training, on the way, and after its last step."""

from __future__ import annotations

from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.collector import Collector
from sapo_ray.driver.course import Course
from sapo_ray.driver.evaluation import Evaluation, evaluate, evaluation_settings
from sapo_ray.types import Prompt


class HeldOut:
    """Measures the accuracy on `prompts`, which may be none."""

    def __init__(self, attempt: Attempt, course: Course, collector: Collector, prompts: list[Prompt]) -> None:
        self._attempt = attempt
        self._course = course
        self._collector = collector
        self._prompts = prompts
        self._metrics: dict[str, float] = {}
        self.before: Evaluation | None = None
        """The one before training; a checkpoint keeps it."""

    async def first(self) -> None:
        """The one before training, unless it was made."""
        self.before = self.before or await self._measure("evaluate_before", sampled=True)

    async def if_due(self) -> None:
        """One on the way, after every `evaluation.every` steps but the last."""
        spec, step = self._attempt.spec, self._course.step
        if spec.evaluation.every and step % spec.evaluation.every == 0 and step < spec.steps:
            await self._measure("evaluate", sampled=False)

    async def last(self) -> Evaluation | None:
        """The one after the last step."""
        return await self._measure("evaluate_after", sampled=True)

    def restored(self, before: Evaluation | None) -> None:
        """Go on from a checkpoint."""
        self.before, self._metrics = before, {}

    def restarted(self) -> None:
        """Go on from the start: the first step's metrics have the accuracy before it, as they had."""
        self._metrics = {} if self.before is None else self.before.metrics()

    def take_metrics(self) -> dict[str, float]:
        """Of the newest evaluation, once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def comparable(self) -> Evaluation | None:
        """The one before training. A resume may change what is evaluated; then it is the accuracy of something else."""
        if self.before is None or self.before.compares_with(evaluation_settings(self._attempt.spec)):
            return self.before
        reason = "evaluation.* changed since the accuracy before training was measured: there is none to compare with"
        self._attempt.journal.event("condition", condition="NotComparable", reason=reason)
        return None

    async def _measure(self, phase: str, *, sampled: bool) -> Evaluation | None:
        """The weights do not change meanwhile, because the loop that changes them waits here."""
        if not self._prompts:
            return None
        spec, journal = self._attempt.spec, self._attempt.journal
        journal.event("phase", phase=phase, step=self._course.step, prompts=len(self._prompts))
        with self._course.phase("evaluation"):
            async with self._course.bounded("the evaluation", spec.deadlines.evaluation_s):
                evaluation = await evaluate(
                    self._collector,
                    self._prompts,
                    spec,
                    step=self._course.step,
                    version=str(self._course.version),
                    sampled=sampled,
                )
        journal.event("evaluation", **evaluation.as_dict())
        self._metrics = evaluation.metrics()
        return evaluation
