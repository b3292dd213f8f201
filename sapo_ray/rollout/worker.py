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
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import psutil

from sapo_ray.actor_log import log_as
from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError, ModelError, SapoRayError, WeightsRefused, WorkerLost
from sapo_ray.rollout import engine as engines
from sapo_ray.rollout.attestation import Gate
from sapo_ray.rollout.sampling import Finished, GroupSampling
from sapo_ray.rollout.takeover import Bucket, WeightReceiver
from sapo_ray.types import CompletionMeta, CompletionPayload, GroupRequest, Takeover, WeightsManifest

_WATCH_S = 0.1  # between two looks at whether the engine lives


class RolloutWorker:
    """One engine; see the module's text. All its methods belong to one event loop."""

    def __init__(self, spec: JobSpec, model_path: str, worker_id: str) -> None:
        log_as(worker_id)
        self._spec, self._model_path, self._id = spec, model_path, worker_id
        self._gate = Gate()
        self._open: dict[str, GroupSampling] = {}
        self._groups = self._completions = self._tokens = 0

    async def start(self, noise: Takeover | None = None) -> dict[str, Any]:
        """Load the model from disk. `noise`: the run's first takeover, if there was one. Returns `stats()`.

        Raises ModelError when the model is missing or of a kind that transformers cannot build.
        """
        try:
            expected = engines.expected_parameters(self._spec, self._model_path)
            self._longest = engines.longest_sequence(self._spec, self._model_path)
            self._tokenizer = engines.tokenizer_of(self._spec, self._model_path)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self._id} cannot load model {self._model_path}: {error}") from error
        self._engine = engines.build_engine(self._spec, self._model_path)
        await self._engine.collective_rpc("release_semaphore_names")
        self._weights = WeightReceiver(
            self._engine,
            self._gate,
            worker_id=self._id,
            expected=expected,
            dtype=self._spec.rollout_dtype,
            deadline_s=self._spec.deadlines.publish_s,
            noise=noise,
        )
        self._processes = _engine_processes()
        self._watch = asyncio.create_task(self._watch_engine())
        return await self.stats()

    async def stop(self) -> None:
        """End the engine and every process of it."""
        self._watch.cancel()
        self._gate.refuse(WorkerLost(f"{self._id} was stopped"))
        self._engine.shutdown(timeout=1)
        _, alive = psutil.wait_procs(self._processes, timeout=1)
        for process in alive:
            with suppress(psutil.NoSuchProcess):  # it ended by itself a moment ago
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
            "groups": self._groups,
            "unfinished": self._engine.get_num_unfinished_requests(),
            "completions": self._completions,
            "tokens": self._tokens,
        }

    async def until_broken(self) -> None:
        """Return never; raises why once this worker can no longer be used."""
        raise _again(await self._gate.refused())

    async def generate(self, request: GroupRequest) -> AsyncGenerator[CompletionMeta | CompletionPayload, None]:
        """Sample a group; yields meta, payload, meta, payload, ... of completions as they finish.

        Everything still running is aborted when the consumer goes away. Raises ConfigError for a prompt that does not
        fit, WeightsRefused when this worker holds no attested weights, WorkerLost when its engine died.
        """
        sampling = self._begin(request)
        try:
            while not sampling.done:
                for meta, payload in await self._collect(sampling, len(request.samples)):
                    yield meta
                    yield payload
        finally:
            sampling.close()

    async def collect(self, key: str, request: GroupRequest | None, places: int) -> tuple[Any, ...]:
        """`generate` for a remote caller, in few calls: begin a group (`request`, first call), return what finished.

        The answer is a tuple of k metas, their k payloads (1 <= k <= places), and None in the remaining places, so
        that with `num_returns=1 + places` each payload is an object of its own. One call for several completions
        costs a fraction of streaming them one by one, and so does a call with few places. Raises as `generate` does.
        """
        if request is not None:
            self._open[key] = self._begin(request)
        sampling = self._open[key]
        batch = await self._collect(sampling, places, patient=True)
        if sampling.done:
            sampling.close()
            self._open.pop(key, None)  # it is gone if the caller went away meanwhile
        metas, payloads = zip(*batch, strict=True)
        return (metas, *payloads, *[None] * (places - len(batch)))

    async def abort(self, key: str) -> None:
        """The caller of `collect` goes away: abort what is still running of its group."""
        if sampling := self._open.pop(key, None):
            sampling.close()

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

    def _begin(self, request: GroupRequest) -> GroupSampling:
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
        self._groups += 1
        key = f"{request.group_id}#{self._groups}"
        return GroupSampling(self._engine, self._tokenizer, self._gate, self._id, request, key)

    async def _collect(self, sampling: GroupSampling, limit: int, *, patient: bool = False) -> list[Finished]:
        batch = await sampling.collect(limit, patient=patient)
        self._completions += len(batch)
        self._tokens += sum(meta.tokens for meta, _ in batch)
        return batch

    async def _watch_engine(self) -> None:
        try:
            while not self._engine.errored:  # noqa: ASYNC110  vLLM tells nobody
                await asyncio.sleep(_WATCH_S)
        except Exception as error:  # noqa: BLE001  an engine that nobody watches is not to be used
            self._gate.refuse(WorkerLost(f"the engine of {self._id} cannot be watched: {error!r}"))
        else:
            self._gate.refuse(WorkerLost(f"the engine of {self._id} died"))


def _again(error: SapoRayError) -> SapoRayError:
    """The same error for another waiter, without the traceback of the first."""
    return type(error)(str(error))


def _engine_processes() -> list[psutil.Process]:
    """Everything below this process but Python's resource tracker, which is not the engine's and ends with it."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a helper that has just ended
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
    return found
