"""How a group's completions are handed out: in few batches, none lost, none before its weights are attested."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from sapo_ray.errors import SapoRayError, WorkerLost
from sapo_ray.rollout import sampling
from sapo_ray.rollout.attestation import Gate
from sapo_ray.rollout.sampling import Finished, GroupSampling
from sapo_ray.types import (
    CompletionMeta,
    CompletionPayload,
    GroupRequest,
    PolicyVersion,
    SampleRequest,
    VersionSpan,
)

OLD, NEW = PolicyVersion(1, 1), PolicyVersion(1, 2)


class Scripted(GroupSampling):
    """A group of four whose completions finish when the test says so."""

    def __init__(self, gate: Gate) -> None:
        samples = tuple(SampleRequest(index=i, seed=i) for i in range(4))
        request = GroupRequest(group_id="g", prompt_token_ids=(1,), samples=samples, max_new_tokens=4, temperature=1.0)
        self.ends: list[asyncio.Future[PolicyVersion]] = [asyncio.get_running_loop().create_future() for _ in samples]
        super().__init__(None, None, gate, "rollout-0", request, "g#1")

    async def _sample(self, sample: SampleRequest) -> Finished:
        version = await self.ends[sample.index]
        meta = CompletionMeta(
            group_id="g",
            sample_index=sample.index,
            prompt_tokens=1,
            tokens=1,
            finish_reason="stop",
            spans=(VersionSpan(version=version, start=0, end=1),),
            worker="rollout-0",
            seconds=0.0,
        )
        ids, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
        return meta, CompletionPayload(prompt_token_ids=ids, token_ids=ids, logprobs=logprobs, text="")

    def finish(self, *indices: int, version: PolicyVersion = OLD) -> None:
        for index in indices:
            self.ends[index].set_result(version)


@pytest.fixture
def gate() -> Gate:
    gate = Gate()
    gate.attest(OLD)
    return gate


def indices(batch: list[Finished]) -> list[int]:
    return [meta.sample_index for meta, _ in batch]


async def test_what_finished_together_comes_together_up_to_the_limit(gate: Gate) -> None:
    group = Scripted(gate)
    group.finish(2, 0, 1)
    await asyncio.sleep(0.01)
    assert indices(await group.collect(2)) == [0, 1]
    assert indices(await group.collect(4)) == [2]
    assert not group.done
    group.finish(3)
    assert indices(await group.collect(4)) == [3]
    assert group.done


async def test_patience_waits_for_others_but_not_for_what_will_not_come(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "PATIENCE_S", (60.0, 60.0))
    group = Scripted(gate)
    group.finish(0)
    batch = asyncio.create_task(group.collect(4, patient=True))
    await asyncio.sleep(0.02)
    group.finish(1, 2)
    await asyncio.sleep(0.02)
    assert not batch.done()
    group.finish(3)
    assert indices(await asyncio.wait_for(batch, 1)) == [0, 1, 2, 3]


async def test_what_was_sampled_under_new_weights_waits_for_their_attestation(gate: Gate) -> None:
    group = Scripted(gate)
    group.finish(0, version=NEW)
    group.finish(1)
    assert indices(await group.collect(4)) == [1]
    held = asyncio.create_task(group.collect(4))
    await asyncio.sleep(0.02)
    assert not held.done()
    gate.attest(NEW)
    assert indices(await asyncio.wait_for(held, 1)) == [0]


async def test_an_error_comes_after_what_did_finish(gate: Gate) -> None:
    group = Scripted(gate)
    group.finish(3)
    await asyncio.sleep(0.01)
    gate.refuse(WorkerLost("the engine of rollout-0 died"))
    await asyncio.sleep(0.01)
    assert indices(await group.collect(4, patient=True)) == [3]
    with pytest.raises(WorkerLost, match="engine of rollout-0 died"):
        await group.collect(4)


async def test_an_engine_error_is_a_lost_worker(gate: Gate) -> None:
    group = Scripted(gate)
    group.ends[1].set_exception(RuntimeError("out of memory"))
    with pytest.raises(WorkerLost, match="rollout-0 failed on group g: RuntimeError"):
        await group.collect(4)


async def test_closing_cancels_what_still_runs(gate: Gate) -> None:
    group = Scripted(gate)
    await asyncio.sleep(0)
    group.close()
    await asyncio.sleep(0)
    assert all(end.cancelled() for end in group.ends)


@pytest.mark.parametrize("patient", [False, True])
async def test_closing_ends_the_wait_of_who_collects(gate: Gate, patient: bool) -> None:
    group = Scripted(gate)
    waiting = asyncio.create_task(group.collect(4, patient=patient))
    await asyncio.sleep(0.01)
    group.close()
    with pytest.raises(SapoRayError, match="group g on rollout-0 was closed before it was collected"):
        await asyncio.wait_for(waiting, 1)


async def test_the_first_error_of_a_group_is_not_covered_by_its_end(gate: Gate) -> None:
    group = Scripted(gate)
    group.ends[0].set_exception(RuntimeError("out of memory"))
    await asyncio.sleep(0.01)
    group.close()
    with pytest.raises(WorkerLost, match="out of memory"):
        await group.collect(4)
