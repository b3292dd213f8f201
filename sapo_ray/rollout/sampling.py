"""Sampling one group with vLLM: one request per completion, each with a seed of its own; the prompt's keys are shared.

A completion is sampled from softmax(logits / temperature) over the whole vocabulary (top-p 1, no top-k, min-p or
penalties), and its log-probs are those of that distribution.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import numpy as np

from sapo_ray.errors import ConfigError, SapoRayError, WorkerLost
from sapo_ray.rollout.attestation import Gate
from sapo_ray.types import (
    CompletionMeta,
    CompletionPayload,
    GroupRequest,
    PolicyVersion,
    SampleRequest,
    VersionSpan,
)

Finished = tuple[CompletionMeta, CompletionPayload]
PATIENCE = 0.5
"""How long finished completions wait for others of their group, as a share of the time it has taken so far."""
PATIENCE_S = (0.2, 5.0)
"""But at least and at most so long: what waits is lost if the worker dies meanwhile."""


class GroupSampling:
    """A group being sampled. Created within the engine's event loop; close it, or its requests go on."""

    def __init__(
        self, engine: Any, tokenizer: Any, gate: Gate, worker_id: str, request: GroupRequest, key: str
    ) -> None:
        self._engine, self._tokenizer, self._gate = engine, tokenizer, gate
        self._id, self._request, self._key = worker_id, request, key
        self._began = time.monotonic()
        self._finished: list[Finished] = []
        self._error: SapoRayError | None = None
        self._changed = asyncio.Event()
        self._left = len(request.samples)
        self._tasks = [asyncio.create_task(self._complete(sample)) for sample in request.samples]
        self._tasks.append(asyncio.create_task(self._fail_with_worker()))

    async def collect(self, limit: int, *, patient: bool = False) -> list[Finished]:
        """Return 1 to `limit` completions that have finished and were not returned before.

        After the first, if `patient`, wait a while for more, though not for what is not to come. Raises WorkerLost,
        WeightsRefused or ConfigError when the rest will not come, after handing out what did finish; SapoRayError
        when the group is closed meanwhile.
        """
        enough = min(limit, self._left)
        while not self._finished and self._error is None:
            await self._changed.wait()
            self._changed.clear()
        shortest, longest = PATIENCE_S
        wait_s = min(max(shortest, PATIENCE * (time.monotonic() - self._began)), longest) if patient else 0.0
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while len(self._finished) < enough and self._error is None:
                    await self._changed.wait()
                    self._changed.clear()
        batch, self._finished = self._finished[:limit], self._finished[limit:]
        self._left -= len(batch)
        if not batch:
            assert self._error is not None
            raise self._error
        return batch

    @property
    def done(self) -> bool:
        """All completions have been collected."""
        return self._left == 0

    def close(self) -> None:
        """Abort what is still running. Whoever still collects is told, for nothing more will come."""
        for task in self._tasks:
            task.cancel()
        self._fail(SapoRayError(f"group {self._request.group_id} on {self._id} was closed before it was collected"))

    async def _complete(self, sample: SampleRequest) -> None:
        try:
            finished = await self._sample(sample)
            newest = max((span.version for span in finished[0].spans), key=lambda version: version.order)
            await self._gate.passes(newest)
        except SapoRayError as error:
            self._fail(error)
        except ValueError as error:  # vLLM's validation of a request
            self._fail(ConfigError(f"group {self._request.group_id} cannot be sampled: {error}"))
        except Exception as error:  # noqa: BLE001  whatever else vLLM raises, the engine is not to be trusted
            self._fail(WorkerLost(f"{self._id} failed on group {self._request.group_id}: {error!r}"))
        else:
            self._finished.append(finished)
            self._changed.set()

    async def _fail_with_worker(self) -> None:
        refusal = await self._gate.refused()
        self._fail(type(refusal)(str(refusal)))

    def _fail(self, error: SapoRayError) -> None:
        self._error = self._error or error
        self._changed.set()

    async def _sample(self, sample: SampleRequest) -> Finished:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        request = self._request
        params = SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=sample.seed,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        prompt = tokens_input(list(request.prompt_token_ids))
        outputs = self._engine.generate(prompt, params, f"{self._key}/{sample.index}")
        (output,) = [result async for result in outputs]
        (completion,) = output.outputs
        if completion.finish_reason not in ("stop", "length"):
            raise WorkerLost(f"{self._id} ended a completion early: {completion.finish_reason}")
        meta = CompletionMeta(
            group_id=request.group_id,
            sample_index=sample.index,
            prompt_tokens=len(request.prompt_token_ids),
            tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            spans=tuple(
                VersionSpan(version=PolicyVersion.parse(span.version), start=span.start, end=span.end)
                for span in completion.weight_versions
            ),
            worker=self._id,
            seconds=time.monotonic() - self._began,
        )
        payload = CompletionPayload(
            prompt_token_ids=np.asarray(request.prompt_token_ids, dtype=np.int32),
            token_ids=np.asarray(completion.token_ids, dtype=np.int32),
            logprobs=np.asarray(completion.logprobs.logprobs, dtype=np.float32),
            text=self._tokenizer.decode(completion.token_ids, skip_special_tokens=True),
        )
        return meta, payload
