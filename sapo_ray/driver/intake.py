"""The driver's intake: from prompts to the next batch, in the order of issue.

PromptSource --fill--> window of outstanding groups --next_batch--> Batch
                          |  one Collector task each
                          +- what cannot be used is dropped with its reason, and its slot is filled again
"""

from __future__ import annotations

import asyncio
from collections import Counter

from sapo_ray.algorithms.advantages import has_signal
from sapo_ray.algorithms.settings import Objective
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.batch import Batch, group_rewards, make_batch, reason_to_drop
from sapo_ray.driver.collector import Collector, GradedGroup
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.parts import Payloads, Prompts
from sapo_ray.driver.window import Window
from sapo_ray.errors import TrainingFailed
from sapo_ray.types import DropReason, PolicyVersion, Prompt

DROPS_IN_A_ROW = 10
"""Batches' worth of groups dropped without one kept before the run fails."""


class Intake:
    """Issues prompts, keeps the window, and makes batches of it.

    The learner's version, which every call is given, has the number of steps taken so far.
    """

    def __init__(
        self, *, spec: JobSpec, objective: Objective, prompts: Prompts, collector: Collector, journal: Journal
    ) -> None:
        self._spec = spec
        self._objective = objective
        self._prompts = prompts
        self._collector = collector
        self._journal = journal
        self.window = Window(capacity=(spec.rollout.max_staleness + 1) * spec.rollout.prompts_per_step)
        self.drops: Counter[DropReason] = Counter()
        """Of the step under way, as are the next two."""
        self.stale: list[GradedGroup] = []
        """Groups among them that were too old."""
        self.examined: list[GradedGroup] = []
        """Groups that the batch was chosen from."""
        self._step: PolicyVersion | None = None
        """Whose counts these are, by the version before it."""
        self._rolled_back = 0
        """Groups given up since the last batch was begun."""

    def allow(self, ahead: int) -> None:
        """Generate so many batches ahead of training from now on; what is outstanding beyond that is used up first."""
        self.window.capacity = (ahead + 1) * self._spec.rollout.prompts_per_step

    def fill(self, version: PolicyVersion) -> None:
        """Issue prompts while slots are free and steps are left that need them."""
        needed = (self._spec.steps - version.number) * self._spec.rollout.prompts_per_step
        while self.window.free() > 0 and len(self.window) < needed:
            prompt = self._prompts.take()
            self._journal.ledger("issued", group=prompt.id, index=prompt.index, version=str(version))
            self.window.issue(prompt, lambda prompt=prompt: asyncio.create_task(self.collect(prompt)))  # type: ignore[misc]

    async def collect(self, prompt: Prompt) -> GradedGroup:
        """One training group, and its line in the ledger."""
        rollout = self._spec.rollout
        group = await self._collector.collect(
            prompt,
            samples=rollout.group_size,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
        )
        self._journal.ledger(
            "graded",
            group=prompt.id,
            completions=[
                {
                    "i": c.meta.sample_index,
                    "tokens": c.meta.tokens,
                    "finish": c.meta.finish_reason,
                    "worker": c.meta.worker,
                    "spans": [[str(span.version), span.start, span.end] for span in c.meta.spans],
                    "verdict": c.grading.verdict,
                    "reward": c.grading.reward,
                    "reason": c.grading.reason,
                    "detail": c.grading.detail,
                }
                for c in group.completions
            ],
        )
        return group

    async def next_batch(self, version: PolicyVersion) -> Batch:
        """The next `prompts_per_step` usable groups in issue order; drops what is not usable, with its reason.

        Raises:
            TrainingFailed: hardly any group can be used.
        """
        wanted = self._spec.rollout.prompts_per_step
        taken: list[GradedGroup] = []
        if self._step != version:
            self._step = version
            self.drops, self.stale, self.examined = Counter(), [], []
        if self._rolled_back:
            self.drops[DropReason.ROLLED_BACK], self._rolled_back = self._rolled_back, 0
        dropped_in_a_row = 0
        while len(taken) < wanted:
            self.fill(version)
            group = await asyncio.shield(self.window.first().task)
            self.examined.append(group)
            reason = reason_to_drop(group, self._spec, version.number)
            if reason is None and self._may_resample(group, wanted - len(taken)):
                self._drop(group, DropReason.ZERO_SIGNAL, version)
            elif reason is None:
                self.window.consume()
                taken.append(group)
                dropped_in_a_row = 0
            else:
                self._drop(group, reason, version)
                dropped_in_a_row += 1
                if dropped_in_a_row >= DROPS_IN_A_ROW * wanted:
                    raise TrainingFailed(
                        f"{dropped_in_a_row} groups in a row could not be used: {_count(self.drops)}; "
                        f"the last: {_last_detail(group)}; see `graded` and `dropped` in journal.jsonl"
                    )
        return make_batch(taken, self._spec, self._objective)

    async def ask_again(self, payloads: Payloads, batch: Batch | None = None) -> bool:
        """Collect those groups anew, each in its place, of which samples are lost; returns whether there were any.

        A `batch` that could not be trained on is taken apart for it.
        """
        if batch is not None:
            self.window.take_back(batch.groups)
            self.examined = [group for group in self.examined if group not in batch.groups]
        graded = self.window.graded()
        lost = await payloads.lost([[c.payload for c in group.completions] for _, group in graded])
        for prompt in (graded[place][0] for place in lost):
            missing = list(range(self._spec.rollout.group_size))
            reason = "its samples were graded, and then lost with their node"
            self._journal.ledger("reissued", group=prompt.id, missing=missing, delivered=0, reason=reason)
            self.window.collect_again(prompt, lambda prompt=prompt: asyncio.create_task(self.collect(prompt)))  # type: ignore[misc]
        return bool(lost)

    async def give_up(self, version: PolicyVersion, kept: frozenset[str]) -> None:
        """End everything under way: its samples belong to a lineage that ends at `version`.

        `kept` are groups that the checkpoint to go back to holds; prompts of all others are issued again from there.
        """
        for prompt in self.window.outstanding():
            if prompt.id not in kept:
                self._journal.ledger("dropped", group=prompt.id, reason=DropReason.ROLLED_BACK, step=version.number + 1)
                self._rolled_back += 1
        await self.window.cancel()

    def drop_samples(self, samples: tuple[tuple[str, int], ...], step: int) -> None:
        """Record (group, sample index) of what the learner could not use."""
        for group_id, sample_index in samples:
            self._journal.ledger("dropped", group=group_id, i=sample_index, reason=DropReason.NONFINITE, step=step)
            self.drops[DropReason.NONFINITE] += 1

    def _may_resample(self, group: GradedGroup, missing: int) -> bool:
        """Dynamic sampling: whether a group without signal is replaced, so that the step stays within its bound."""
        algorithm = self._spec.algorithm
        bound = algorithm.dynamic_sampling_limit * self._spec.rollout.prompts_per_step
        return (
            algorithm.dynamic_sampling
            and len(self.examined) + missing <= bound
            and not has_signal(group_rewards(group, self._spec))
        )

    def _drop(self, group: GradedGroup, reason: DropReason, version: PolicyVersion) -> None:
        """Give up the group at the front of the window."""
        self._journal.ledger("dropped", group=group.prompt.id, reason=reason, step=version.number + 1)
        self.drops[reason] += 1
        if reason is DropReason.STALE:
            self.stale.append(group)
        self.window.drop()


def _count(drops: Counter[DropReason]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in drops.items())


def _last_detail(group: GradedGroup) -> str:
    """Why the last completion of a group has no verdict, in the verifier's words."""
    if not group.completions:
        return f"group {group.prompt.id} has no completions"
    grading = group.completions[-1].grading
    return f"{grading.reason} {grading.detail}".strip() or "no reason given"
