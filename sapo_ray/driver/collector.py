"""From one prompt to one graded group.

    prompt --> rollout worker --> completions (streamed) --> verifier --> GradedGroup

Consumes: a prompt. Produces: its G graded completions, or the reason why there are none.
Waits for: an attested worker, then the worker, then the verifier; each wait is bounded.

What a dead worker had not delivered is asked for again, one by one and under the same seeds, so the group that results
does not depend on who died when. A prompt that costs a worker its life, or its deadline, twice is quarantined.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from ray.exceptions import ObjectLostError, RayTaskError

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.parts import Ref, Rollouts, Verifiers
from sapo_ray.errors import ResourceError, WorkerLost
from sapo_ray.types import (
    CompletionMeta,
    DropReason,
    Grading,
    GroupRequest,
    Prompt,
    SampleRequest,
    sampling_seed,
)

MAX_STRIKES = 2
"""Lost workers or missed deadlines of one prompt before it is quarantined."""
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
    generation_seconds: float
    grading_seconds: float
    failed: DropReason | None = None


class Collector:
    """Collects groups; any number of `collect` calls run side by side."""

    def __init__(self, spec: JobSpec, rollouts: Rollouts, verifiers: Verifiers, journal: Journal) -> None:
        self._spec = spec
        self._rollouts = rollouts
        self._verifiers = verifiers
        self._journal = journal

    async def collect(
        self, prompt: Prompt, *, samples: int, temperature: float, max_new_tokens: int, stream: str = ""
    ) -> GradedGroup:
        """Sample and grade `samples` completions of `prompt`. `stream` separates seeds of evaluations from training."""
        seeds = [sampling_seed(self._spec.seed, stream + prompt.id, i) for i in range(samples)]
        finished: dict[int, tuple[CompletionMeta, Ref]] = {}
        strikes = lost_payloads = 0
        began = time.monotonic()
        while True:
            try:
                await self._generate(prompt, seeds, finished, temperature, max_new_tokens)
                generated = time.monotonic()
                gradings = await self._verifiers.grade(
                    prompt.text, prompt.gold, [finished[i][1] for i in range(samples)]
                )
                break
            except (WorkerLost, TimeoutError) as error:
                strikes += 1
                self._journal.ledger("reissued", group=prompt.id, delivered=len(finished), reason=str(error))
                if strikes >= MAX_STRIKES:
                    self._journal.event("condition", condition="Quarantined", group=prompt.id, reason=str(error))
                    return self._empty(prompt, strikes, time.monotonic() - began, DropReason.QUARANTINED)
            except (ObjectLostError, RayTaskError) as error:
                if isinstance(error, RayTaskError) and not isinstance(error.cause, ObjectLostError):
                    raise
                lost_payloads += 1
                if lost_payloads > MAX_LOST_PAYLOADS:
                    raise ResourceError(
                        f"finished samples of group {prompt.id} were lost {lost_payloads} times; "
                        "are nodes going away, or is the object store too small?"
                    ) from error
                # The node that held finished samples is gone: everything not yet graded is asked for again.
                self._journal.ledger("reissued", group=prompt.id, delivered=0, reason="payload lost")
                finished.clear()
        done = time.monotonic()
        return GradedGroup(
            prompt=prompt,
            completions=tuple(
                GradedCompletion(meta=finished[i][0], payload=finished[i][1], grading=gradings[i])
                for i in range(samples)
            ),
            reissues=strikes,
            generation_seconds=generated - began,
            grading_seconds=done - generated,
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
        async with asyncio.timeout(self._spec.rollout.group_deadline_s):
            async for meta, payload in self._rollouts.generate(request):
                finished[meta.sample_index] = (meta, payload)
        if short := [sample.index for sample in missing if sample.index not in finished]:
            raise WorkerLost(f"group {prompt.id}: completions {short} were not delivered")

    @staticmethod
    def _empty(prompt: Prompt, strikes: int, seconds: float, reason: DropReason) -> GradedGroup:
        return GradedGroup(
            prompt=prompt,
            completions=(),
            reissues=strikes,
            generation_seconds=seconds,
            grading_seconds=0.0,
            failed=reason,
        )
