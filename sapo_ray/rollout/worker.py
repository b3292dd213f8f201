"""The rollout worker: one vLLM engine that samples under attested weights only.

    generate   prompt -> completions as they finish, each token with the version it was sampled under
    take_over  manifest + buckets -> the engine goes on under the new weights, between two decoding steps

A worker holds no attested weights until its first takeover, and none ever again after a takeover failed or its engine
died: it is for the pool to end such a worker and start another.

A plain class; it becomes a Ray actor where the pool spawns it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import psutil
from transformers import AutoTokenizer

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError, SapoRayError, WeightsRefused, WorkerLost
from sapo_ray.rollout import engine as engines
from sapo_ray.rollout.attestation import Gate
from sapo_ray.rollout.takeover import Bucket, WeightReceiver
from sapo_ray.types import (
    CompletionMeta,
    CompletionPayload,
    GroupRequest,
    PolicyVersion,
    SampleRequest,
    Takeover,
    VersionSpan,
    WeightsManifest,
)

Finished = tuple[CompletionMeta, CompletionPayload]
_WATCH_S = 0.1  # between two looks at whether the engine lives


class RolloutWorker:
    """One engine; see the module's text. All its methods belong to one event loop."""

    def __init__(self, spec: JobSpec, model_path: str, worker_id: str) -> None:
        self._spec, self._model_path, self._id = spec, model_path, worker_id
        self._gate = Gate()
        self._requests = self._completions = self._tokens = 0

    async def start(self, noise: Takeover | None = None) -> dict[str, Any]:
        """Load the model from disk. `noise`: the run's first takeover, if there was one. Returns `stats()`."""
        expected = engines.expected_parameters(self._spec, self._model_path)
        self._longest = engines.longest_sequence(self._spec, self._model_path)
        self._tokenizer = AutoTokenizer.from_pretrained(
            self._model_path, trust_remote_code=self._spec.model.trust_remote_code
        )
        self._engine = engines.build_engine(self._spec, self._model_path)
        self._weights = WeightReceiver(
            self._engine,
            self._gate,
            worker_id=self._id,
            expected=expected,
            dtype=self._spec.rollout_dtype,
            deadline_s=self._spec.deadlines.publish_s,
            noise=noise,
        )
        # Python's resource tracker is not the engine's, and ends with this process.
        children = psutil.Process().children(recursive=True)
        self._processes = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        self._watch = asyncio.create_task(self._watch_engine())
        return await self.stats()

    async def stop(self) -> None:
        """End the engine and every process of it."""
        self._watch.cancel()
        self._gate.refuse(WorkerLost(f"{self._id} was stopped"))
        self._engine.shutdown(timeout=1)
        _, alive = psutil.wait_procs(self._processes, timeout=1)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)

    async def stats(self) -> dict[str, Any]:
        """Identity and counters; answering is the worker's heartbeat."""
        return {
            "worker": self._id,
            "pid": os.getpid(),
            "engine_pids": [process.pid for process in self._processes],
            "address": socket.gethostname(),
            "version": self._gate.attested,
            "requests": self._requests,
            "completions": self._completions,
            "tokens": self._tokens,
        }

    async def until_broken(self) -> None:
        """Return never; raises why once this worker can no longer be used."""
        raise _again(await self._gate.refused())

    async def generate(
        self, request: GroupRequest
    ) -> AsyncGenerator[tuple[CompletionMeta, ...] | CompletionPayload, None]:
        """Sample a group; yields completions as they finish, in batches of what is finished at that moment.

        A batch is a tuple of k metas, then the k payloads in the same order, each an object of its own. Everything
        still running is aborted when the consumer goes away. Raises ConfigError for a prompt that does not fit,
        WeightsRefused when this worker holds no attested weights, WorkerLost when its engine died.
        """
        self._check(request)
        finished: asyncio.Queue[Finished | SapoRayError] = asyncio.Queue()
        running = [asyncio.create_task(self._complete(request, sample, finished)) for sample in request.samples]
        running.append(asyncio.create_task(self._report_break(finished)))
        try:
            left = len(request.samples)
            while left:
                batch, error = await _drain(finished)
                left -= len(batch)
                if batch:
                    yield tuple(meta for meta, _ in batch)
                for _, payload in batch:
                    yield payload
                if error is not None:
                    raise error
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def take_over(self, manifest: WeightsManifest, *buckets: Bucket) -> Takeover:
        """See WeightReceiver.take_over."""
        return await self._weights.take_over(manifest, *buckets)

    # What vLLM's RayVLLMWeightSyncClient calls on each worker.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self._weights.init_weight_transfer_engine(request)

    async def shutdown_weight_transfer_engine(self) -> None:
        await self._weights.shutdown_weight_transfer_engine()

    async def start_weight_update(self) -> None:
        await self._weights.start_weight_update()

    async def update_weights(self, request: Any) -> None:
        await self._weights.update_weights(request)

    async def finish_weight_update(self) -> None:
        await self._weights.finish_weight_update()

    async def update_weight_version(self, new_version: str) -> None:
        await self._weights.update_weight_version(new_version)

    def _check(self, request: GroupRequest) -> None:
        if self._gate.refusal is not None:
            raise _again(self._gate.refusal)
        if self._gate.attested is None:
            raise WeightsRefused(f"{self._id} has taken over no weights yet, so it must not sample")
        length = len(request.prompt_token_ids) + request.max_new_tokens
        if length > self._longest:
            raise ConfigError(
                f"prompt and completion of group {request.group_id} may have {length} tokens, but the model or "
                f"data.max_prompt_tokens + rollout.max_new_tokens allow {self._longest}; lower rollout.max_new_tokens"
            )

    async def _complete(
        self, request: GroupRequest, sample: SampleRequest, finished: asyncio.Queue[Finished | SapoRayError]
    ) -> None:
        try:
            meta, payload = await self._sample(request, sample)
            await self._gate.passes(max(span.version for span in meta.spans))
        except SapoRayError as error:
            finished.put_nowait(error)
        except ValueError as error:  # vLLM's validation of a request
            finished.put_nowait(ConfigError(f"group {request.group_id} cannot be sampled: {error}"))
        except Exception as error:  # noqa: BLE001  whatever else vLLM raises, the engine is not to be trusted
            finished.put_nowait(WorkerLost(f"{self._id} failed on group {request.group_id}: {error!r}"))
        else:
            self._completions += 1
            self._tokens += meta.tokens
            finished.put_nowait((meta, payload))

    async def _sample(self, request: GroupRequest, sample: SampleRequest) -> Finished:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        began = time.monotonic()
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
        self._requests += 1
        prompt = tokens_input(list(request.prompt_token_ids))
        outputs = self._engine.generate(prompt, params, f"{request.group_id}/{sample.index}#{self._requests}")
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
            seconds=time.monotonic() - began,
        )
        payload = CompletionPayload(
            prompt_token_ids=np.asarray(request.prompt_token_ids, dtype=np.int32),
            token_ids=np.asarray(completion.token_ids, dtype=np.int32),
            logprobs=np.asarray(completion.logprobs.logprobs, dtype=np.float32),
            text=self._tokenizer.decode(completion.token_ids, skip_special_tokens=True),
        )
        return meta, payload

    async def _report_break(self, finished: asyncio.Queue[Finished | SapoRayError]) -> None:
        finished.put_nowait(_again(await self._gate.refused()))

    async def _watch_engine(self) -> None:
        while not self._engine.errored:  # noqa: ASYNC110  vLLM tells nobody
            await asyncio.sleep(_WATCH_S)
        self._gate.refuse(WorkerLost(f"the engine of {self._id} died"))


async def _drain(queue: asyncio.Queue[Finished | SapoRayError]) -> tuple[list[Finished], SapoRayError | None]:
    """Wait for one item and take all that are there, up to the first error."""
    batch: list[Finished] = []
    item = await queue.get()
    while not isinstance(item, SapoRayError):
        batch.append(item)
        if queue.empty():
            return batch, None
        item = queue.get_nowait()
    return batch, item


def _again(error: SapoRayError) -> SapoRayError:
    """The same error for another waiter, without the traceback of the first."""
    return type(error)(str(error))
