"""From one prompt to one graded group.

    prompt --> rollout worker --> completions (streamed) --> verifier --> GradedGroup

Consumes: a prompt. Produces: its G graded completions, or the reason why there are none.
Waits for: an attested worker, then the worker, then the verifier; each wait is bounded.

What a dead worker had not delivered is asked for again, one by one and under the same seeds, so the group that results
does not depend on who died when. Who is to blame:

    a worker was lost once       nobody is suspected: its groups are repeated side by side, as many as there are
    a second time                the group is a suspect, as its neighbours may be: suspects are repeated one at a time
    a third time, alone          quarantined
    its own deadline missed      a suspect; the second time quarantined
    its worker was scaled away   nobody
    no worker is there           nobody: the group waits, as long as whoever waits for it does (deadlines.batch_s,
                                 deadlines.evaluation_s)

Groups are admitted as the engines of the living workers have room, training and evaluation together, in the order in
which they were asked for: the deadline of a group does not run while it would only wait in a queue.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass

from ray.exceptions import RayError

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.admission import Admission
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.parts import Ref, Rollouts, Verifiers
from sapo_ray.driver.pulse import Pulse
from sapo_ray.errors import NoWorker, ResourceError, WorkerDrained, WorkerLost
from sapo_ray.lost_payloads import payload_lost
from sapo_ray.types import (
    CompletionMeta,
    DropReason,
    Grading,
    GroupRequest,
    Prompt,
    SampleRequest,
    sampling_seed,
)

MAX_LOSSES = 3
"""Lost workers of one prompt before it is quarantined; the first may be anybody's doing: hundreds share a worker."""
MAX_MISSES = 2
"""Missed deadlines of one prompt before it is quarantined."""
QUEUED_PER_SEQUENCE = 2
"""Completions admitted per sequence that the engines decode at once: some wait there, so that no engine runs dry."""
MAX_LOST_PAYLOADS = 10
"""Times that finished samples of one prompt may be lost with their node before the run gives up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedCompletion:
    """One finished, graded completion."""

    meta: CompletionMeta
    payload: Ref
    grading: Grading


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedGroup:
    """All completions of one prompt, in order of their sample index; empty with a reason if there are none."""

    prompt: Prompt
    completions: tuple[GradedCompletion, ...]
    reissues: int
    failed: DropReason | None = None


class Collector:
    """Collects groups; any number of `collect` calls run side by side."""

    def __init__(
        self, spec: JobSpec, rollouts: Rollouts, verifiers: Verifiers, journal: Journal, pulse: Pulse | None = None
    ) -> None:
        self._spec = spec
        self._rollouts = rollouts
        self._verifiers = verifiers
        self._journal = journal
        self._pulse = pulse or Pulse()
        self._suspects = asyncio.Lock()
        self._admission = Admission(self._places)
        self._living = self._unasked = 0

    def room_changed(self) -> None:
        """Workers came or went: what waits for room may have it now."""
        self._admission.look()

    def busy_seconds(self) -> float:
        """How long completions were asked of the workers, of the collector's life so far."""
        return self._admission.busy_seconds()

    def _places(self) -> int:
        """Completions that may be under way at once. Without a worker those of one: they wait where it comes back."""
        self._unasked -= 1
        if self._unasked < 0:  # of many workers it does not matter at once whether one more lives
            self._living = self._rollouts.living()
            self._unasked = self._living // 32
        return QUEUED_PER_SEQUENCE * max(1, self._living) * self._spec.rollout.max_num_seqs

    async def collect(
        self, prompt: Prompt, *, samples: int, temperature: float, max_new_tokens: int, stream: str = ""
    ) -> GradedGroup:
        """Sample and grade `samples` completions of `prompt`. `stream` separates seeds of evaluations from training."""
        seeds = [sampling_seed(self._spec.seed, stream + prompt.id, i) for i in range(samples)]
        finished: dict[int, tuple[CompletionMeta, Ref]] = {}
        losses = misses = drains = lost_payloads = 0

        def reissued(reason: str) -> None:
            missing = [i for i in range(samples) if i not in finished]
            self._journal.ledger("reissued", group=prompt.id, missing=missing, delivered=len(finished), reason=reason)

        while True:
            try:
                suspected = misses > 0 or losses > 1
                async with self._suspects if suspected else nullcontext(), self._admission.admitted(samples):
                    with self._pulse.timed("sample"):
                        await self._generate(prompt, seeds, finished, temperature, max_new_tokens)
                with self._pulse.timed("grade"):
                    gradings = await self._verifiers.grade(
                        prompt.text, prompt.gold, [finished[i][1] for i in range(samples)]
                    )
                break
            except NoWorker as error:  # its worker is being replaced: whoever waits for this group has a bound too
                self._journal.ledger("waited", group=prompt.id, reason=str(error))
            except WorkerDrained as error:
                drains += 1
                reissued(str(error))
            except (WorkerLost, TimeoutError) as error:
                losses += isinstance(error, WorkerLost)
                misses += not isinstance(error, WorkerLost)
                reason = (
                    str(error) or f"nothing within rollout.group_deadline_s ({self._spec.rollout.group_deadline_s:g} s)"
                )
                reissued(reason)
                if losses >= MAX_LOSSES or misses >= MAX_MISSES:
                    self._journal.event("condition", condition="Quarantined", group=prompt.id, reason=reason)
                    return self._empty(prompt, losses + misses, DropReason.QUARANTINED)
            except RayError as error:
                if not payload_lost(error):
                    raise
                lost_payloads += 1
                if lost_payloads > MAX_LOST_PAYLOADS:
                    raise ResourceError(
                        f"finished samples of group {prompt.id} were lost {lost_payloads} times; "
                        "are nodes going away, or is the object store too small?"
                    ) from error
                # The node that held finished samples is gone: everything not yet graded is asked for again.
                finished.clear()
                reissued("payload lost")
        return GradedGroup(
            prompt=prompt,
            completions=tuple(
                GradedCompletion(meta=finished[i][0], payload=finished[i][1], grading=gradings[i])
                for i in range(samples)
            ),
            reissues=losses + misses + drains,
        )

    async def _generate(
        self,
        prompt: Prompt,
        seeds: list[int],
        finished: dict[int, tuple[CompletionMeta, Ref]],
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        """Ask for what is missing in `finished` and add it as it comes."""
        missing = tuple(SampleRequest(index=i, seed=seed) for i, seed in enumerate(seeds) if i not in finished)
        if not missing:
            return
        request = GroupRequest(
            group_id=prompt.id,
            prompt_token_ids=prompt.token_ids,
            samples=missing,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        # The pool bounds the wait for a worker and the sampling by this deadline each, and says more about both; this
        # bound is for a pool that does not.
        async with asyncio.timeout(self._spec.rollout.group_deadline_s * 2.2 + 0.5):
            async for meta, payload in self._rollouts.generate(request):
                finished[meta.sample_index] = (meta, payload)
        if short := [sample.index for sample in missing if sample.index not in finished]:
            raise WorkerLost(f"group {prompt.id}: completions {short} were not delivered")

    @staticmethod
    def _empty(prompt: Prompt, reissues: int, reason: DropReason) -> GradedGroup:
        return GradedGroup(
            prompt=prompt,
            completions=(),
            reissues=reissues,
            failed=reason,
        )
