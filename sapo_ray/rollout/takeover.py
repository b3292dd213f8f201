"""How an engine's weights are replaced while requests are in flight, and how the result is attested.

    pause -> start -> receive (buckets, or a native push) -> finish -> compare checksums -> version
          -> queue the canary -> resume -> the canary's verdict -> the gate opens

Requests in flight go on under the new weights from `resume` on; what finishes before the verdict waits at the gate.
Whatever fails after `start` breaks the worker for good.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sapo_ray.errors import DeadlineExceeded, SapoRayError, WeightsRefused
from sapo_ray.rollout.attestation import Gate, canary_differences, check_canary, check_manifest, check_received
from sapo_ray.rollout.scratch import Scratch
from sapo_ray.types import Canary, Takeover, WeightsManifest

Result = TypeVar("Result")
Bucket = npt.NDArray[np.uint8]


class WeightReceiver:
    """The weights of one engine."""

    def __init__(
        self,
        engine: Any,
        gate: Gate,
        *,
        worker_id: str,
        expected: Mapping[str, tuple[int, ...]],
        dtype: str,
        deadline_s: float,
        noise: Takeover | None = None,
    ) -> None:
        self._engine, self._gate, self._id = engine, gate, worker_id
        self._expected, self._dtype, self._deadline_s = expected, dtype, deadline_s
        self._noise = noise
        self._lock = asyncio.Lock()
        self._pushed = False  # a native push has finished and waits for its manifest
        self._updates = 0

    async def take_over(self, manifest: WeightsManifest, *buckets: Bucket) -> Takeover:
        """Bring the engine to `manifest`, from `buckets` (uint8 [nbytes] each) or from a native push before this.

        Raises WeightsRefused: before anything was touched if the manifest is not the model's, otherwise the worker is
        broken. One bucket at a time is copied.
        """
        async with self._lock:
            began = time.monotonic()
            check_manifest(manifest, self._expected, self._dtype)
            if buckets and tuple(bucket.nbytes for bucket in buckets) != manifest.bucket_nbytes:
                raise WeightsRefused(f"buckets of weights {manifest.version} have not the sizes of the manifest")
            if not buckets and not self._pushed:
                raise WeightsRefused(f"weights {manifest.version} came without buckets, and none were pushed before")
            try:
                if buckets:
                    await self._receive(manifest, buckets)
                return await self._attest(manifest, began)
            except BaseException as error:
                raise self._broken(f"weights {manifest.version}", error) from error

    # The verbs of vLLM's weight-sync client, for native transports. The manifest follows with `take_over`.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        """Join the learner's transfer group; leaves an earlier one first (vLLM would leak it)."""
        await self._push_verb(self._join(request), "join the transfer group")

    async def shutdown_weight_transfer_engine(self) -> None:
        """Leave the learner's transfer group."""
        await self._push_verb(self._engine.shutdown_weight_transfer_engine(), "leave the transfer group")

    async def start_weight_update(self) -> None:
        """Pause between two decoding steps. The engine stays paused until `take_over`."""
        await self._push_verb(self._start(), "start a weight push")

    async def update_weights(self, request: Any) -> None:
        """Receive what the learner pushes."""
        await self._push_verb(self._engine.update_weights(request), "receive pushed weights")

    async def finish_weight_update(self) -> None:
        """All has been pushed."""
        await self._push_verb(self._engine.finish_weight_update(), "finish a weight push")
        self._pushed = True

    async def update_weight_version(self, new_version: str) -> None:
        """The manifest says which version it is."""

    async def _push_verb(self, work: Coroutine[Any, Any, None], what: str) -> None:
        try:
            await self._bounded(work, what)
        except BaseException as error:
            raise self._broken("pushed weights", error) from error

    async def _join(self, request: Any) -> None:
        await self._engine.shutdown_weight_transfer_engine()
        await self._engine.init_weight_transfer_engine(request)

    async def _start(self) -> None:
        self._pushed = False
        # Cached keys and values of old weights are wrong under new ones, for running requests too.
        await self._bounded(self._engine.pause_generation(mode="keep", clear_cache=True), "pause generation")
        await self._bounded(self._engine.start_weight_update(), "start the weight update")

    async def _receive(self, manifest: WeightsManifest, buckets: tuple[Bucket, ...]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._start()
        with Scratch(max(manifest.bucket_nbytes)) as scratch:
            for number, bucket in enumerate(buckets):
                await asyncio.to_thread(scratch.write, bucket)
                tensors = [
                    (meta.name, meta.dtype, list(meta.shape), meta.offset, meta.nbytes, meta.checksum)
                    for meta in manifest.tensors
                    if meta.bucket == number
                ]
                update = {"path": scratch.path, "nbytes": bucket.nbytes, "tensors": tensors}
                request = WeightTransferUpdateRequest(update_info=update)
                await self._bounded(self._engine.update_weights(request), f"load bucket {number} of weights")
        await self._bounded(self._engine.finish_weight_update(), "finish the weight update")

    async def _attest(self, manifest: WeightsManifest, began: float) -> Takeover:
        self._pushed = False
        for received in await self._bounded(self._engine.collective_rpc("received_weights"), "ask what arrived"):
            check_received(manifest, received)
        await self._engine.update_weight_version(str(manifest.version))
        logprobs = await self._bounded(self._resume_with_canary(manifest.canary), "answer the canary")
        largest, mean = canary_differences(manifest.canary, logprobs)
        takeover = Takeover(
            worker=self._id,
            version=manifest.version,
            seconds=time.monotonic() - began,
            canary_max=largest,
            canary_mean=mean,
        )
        check_canary(takeover, self._dtype, self._noise)
        self._noise = self._noise or takeover
        self._gate.attest(manifest.version)
        return takeover

    async def _resume_with_canary(self, canary: Canary) -> list[list[float]]:
        """Queue the canary before everything else, let generation go on, and return its log-probs."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        params.output_kind = params.output_kind.FINAL_ONLY
        self._updates += 1
        answers = [
            await self._engine.add_request(
                f"canary-{self._updates}-{number}", tokens_input(list(sequence)), params, priority=-1
            )
            for number, sequence in enumerate(canary.sequences)
        ]
        await self._engine.resume_generation()
        return [list((await answer.get()).prompt_logprobs.logprobs) for answer in answers]

    async def _bounded(self, work: Coroutine[Any, Any, Result], what: str) -> Result:
        """Await `work`, no longer than the deadline and no longer than the worker is whole."""
        task, broken = asyncio.ensure_future(work), asyncio.ensure_future(self._gate.refused())
        try:
            await asyncio.wait({task, broken}, timeout=self._deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if broken.done():
                raise broken.result()
            raise DeadlineExceeded(f"{self._id} did not {what} within {self._deadline_s:g} s (deadlines.publish_s)")
        finally:
            task.cancel()
            broken.cancel()

    def _broken(self, what: str, error: BaseException) -> WeightsRefused:
        """Break the worker: an engine with half of an update in it must not sample again."""
        reason = str(error) if isinstance(error, SapoRayError) else f"{type(error).__name__}: {error}"
        refusal = WeightsRefused(f"{self._id} could not take over {what}: {reason}")
        self._gate.refuse(refusal)
        return refusal
