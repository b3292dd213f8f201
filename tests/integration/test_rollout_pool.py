"""Rollout workers with real vLLM engines: what they sample, which weights they hold, and what happens when they die."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import ray
from weights import Policy

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError, ModelError, WeightsRefused, WorkerLost
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.rollout.remote import WorkerInfo, WorkerState
from sapo_ray.rollout.scratch import Scratch
from sapo_ray.types import (
    CompletionMeta,
    CompletionPayload,
    GroupRequest,
    PolicyVersion,
    Published,
    SampleRequest,
    VersionSpan,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

NOISE = 0.05
"""Of a random update, per weight: log-probs then differ by about 1, far above the tolerance."""
Sampled = dict[int, tuple[CompletionMeta, CompletionPayload]]


class Cluster:
    """The pool under test, and the policies that were given to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = JobSpec.model_validate(
            {
                "steps": 1,
                "model": {"path": "builtin:addition", "dtype": "float32"},
                "data": {"train": [{"path": "builtin:addition"}], "template": "plain", "max_prompt_tokens": 64},
                "rollout": {"workers": 2, "max_new_tokens": 900, "max_num_seqs": 64, "kv_cache_mb": 64},
                "deadlines": {"publish_s": 400, "start_s": 400},
            }
        )
        self.pool = RolloutPool(self.spec, str(folder))
        self.number = -1
        self.policy: Policy
        self.before_first_takeover: Exception | None = None

    def next_policy(self) -> Policy:
        self.number += 1
        return Policy(self.folder, self.number, noise=NOISE if self.number else 0.0)

    async def update(self, policy: Policy | None = None) -> Policy:
        """All workers on a new policy, the first one that of the folder."""
        self.policy = policy or self.next_policy()
        takeovers = await self.pool.update(self.policy.published())
        assert {takeover.version for takeover in takeovers} == {self.policy.version}
        return self.policy

    async def healthy(self) -> list[WorkerInfo]:
        """Both workers, once both hold the newest weights."""
        async with asyncio.timeout(300):
            while True:
                workers = self.pool.workers()
                if len(workers) == 2 and all(worker.version == self.policy.version for worker in workers):
                    return workers
                await asyncio.sleep(0.1)

    async def sample(self, request: GroupRequest) -> Sampled:
        found: Sampled = {}
        await collect(self.pool.generate(request), found)
        return found

    async def sample_on(self, worker: WorkerInfo, request: GroupRequest) -> Sampled:
        """On one worker, past the pool."""
        found: Sampled = {}
        begin: GroupRequest | None = request
        while left := len(request.samples) - len(found):
            metas, *payloads = await worker.actor.collect.remote(request.group_id, begin, left)
            begin = None
            found |= {meta.sample_index: (meta, payload) for meta, payload in zip(metas, payloads, strict=False)}
        return found

    def events(self) -> list[dict[str, Any]]:
        return [self.pool.events.get_nowait() for _ in range(self.pool.events.qsize())]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def cluster(
    ray_session: None, addition_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    # A model with a taste of its own, which must show nowhere: everything below compares with the plain policy.
    folder = tmp_path_factory.mktemp("opinionated") / "model"
    shutil.copytree(addition_model, folder)
    taste = json.loads((folder / "generation_config.json").read_text())
    taste |= {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.5, "repetition_penalty": 1.3}
    (folder / "generation_config.json").write_text(json.dumps(taste))
    cluster = Cluster(folder)
    await cluster.pool.start()
    try:
        await cluster.sample_on(cluster.pool.workers()[0], group("too early"))
    except WeightsRefused as error:
        cluster.before_first_takeover = error
    await cluster.update()
    yield cluster
    await cluster.pool.close()


@pytest.fixture
def shm() -> Iterator[None]:
    """No weights are left behind in shared memory (Ray's own store, momentary semaphores and other programs apart)."""

    def files() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if not name.startswith(("plasma", "sem.", "PostgreSQL."))}

    before = files()
    yield
    assert files() - before == set()


def group(name: str, size: int = 4, *, new: int = 28, temperature: float = 1.0, first: int = 0) -> GroupRequest:
    samples = tuple(SampleRequest(index=i, seed=7919 * i + 1) for i in range(first, first + size))
    return GroupRequest(
        group_id=name,
        prompt_token_ids=(6, 12, 63, 7, 10, 62),
        samples=samples,
        max_new_tokens=new,
        temperature=temperature,
    )


async def collect(completions: AsyncIterator[tuple[CompletionMeta, Any]], found: Sampled) -> None:
    async for meta, ref in completions:
        found[meta.sample_index] = (meta, await ref)


def same(one: Sampled, other: Sampled) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        np.array_equal(one[i][1].token_ids, other[i][1].token_ids)
        and np.array_equal(one[i][1].logprobs, other[i][1].logprobs)
        for i in one
    )


def furthest(policy: Policy, sampled: Sampled, temperature: float = 1.0) -> float:
    """Largest |difference| between the sampler's log-probs and the policy's."""
    return max(
        float(np.abs(policy.logprobs(payload, temperature) - payload.logprobs).max()) for _, payload in sampled.values()
    )


async def test_a_worker_does_not_sample_before_it_took_weights_over(cluster: Cluster) -> None:
    assert isinstance(cluster.before_first_takeover, WeightsRefused)
    assert "taken over no weights" in str(cluster.before_first_takeover)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_sampled_logprobs_are_those_of_the_policy_before_and_after_an_update(
    cluster: Cluster, temperature: float
) -> None:
    before = await cluster.healthy() and cluster.policy
    old = await cluster.sample(group("before", 16, temperature=temperature))
    after = await cluster.update()
    new = await cluster.sample(group("after", 16, temperature=temperature))
    assert furthest(before, old, temperature) < 1e-4
    assert furthest(after, new, temperature) < 1e-4
    assert furthest(before, new, temperature) > 0.5
    wrong_temperature = 1.7 - temperature
    assert furthest(after, new, wrong_temperature) > 0.1


async def test_a_completion_is_what_its_meta_says(cluster: Cluster) -> None:
    sampled = await cluster.sample(group("meta", 48, new=120))
    ends = {meta.finish_reason for meta, _ in sampled.values()}
    assert ends == {"stop", "length"}
    for meta, payload in sampled.values():
        assert (meta.group_id, meta.prompt_tokens, meta.tokens) == ("meta", 6, len(payload.token_ids))
        assert len(payload.logprobs) == meta.tokens
        assert payload.prompt_token_ids.tolist() == [6, 12, 63, 7, 10, 62]
        assert meta.spans == (VersionSpan(version=cluster.policy.version, start=0, end=meta.tokens),)
        # The end-of-sequence token counts as sampled, and is not part of the text.
        assert (meta.finish_reason == "stop") == (payload.token_ids[-1] == cluster.policy.model.config.eos_token_id)
        assert "<|" not in payload.text


async def test_temperature_0_is_greedy(cluster: Cluster) -> None:
    sampled = await cluster.sample(group("greedy", 2, temperature=0.0))
    for _, payload in sampled.values():
        assert payload.token_ids.tolist() == cluster.policy.greedy(payload).tolist()
    assert sampled[0][1].text == sampled[1][1].text


async def test_a_seed_gives_the_same_tokens_whatever_the_grouping_and_the_worker(cluster: Cluster) -> None:
    one, two = await cluster.healthy()
    together = await cluster.sample_on(one, group("all", 32))
    elsewhere = await cluster.sample_on(two, group("there", 32))
    parts = await asyncio.gather(*(cluster.sample(group(f"part{i}", 4, first=i)) for i in range(0, 32, 4)))
    assert same(together, elsewhere)
    assert same(together, {i: pair for part in parts for i, pair in part.items()})
    assert len({tuple(payload.token_ids) for _, payload in together.values()}) == 32


async def test_tokens_after_an_update_in_flight_carry_the_new_version_and_match_it(cluster: Cluster) -> None:
    old, new = cluster.policy, cluster.next_policy()  # made before: making one takes as long as some answers
    running = asyncio.create_task(cluster.sample(group("in flight", 64, new=900)))
    while not any(worker.in_flight for worker in cluster.pool.workers()):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)
    await cluster.update(new)
    sampled = await running
    crossing = {i: pair for i, pair in sampled.items() if len(pair[0].spans) == 2}
    assert len(crossing) >= 8
    for meta, payload in crossing.values():
        first, second = meta.spans
        assert (first.version, second.version) == (old.version, new.version)
        assert (first.start, first.end, second.end) == (0, second.start, meta.tokens)
        switch = second.start
        assert np.abs(old.logprobs(payload) - payload.logprobs)[:switch].max() < 1e-4
        assert np.abs(new.logprobs(payload) - payload.logprobs)[switch:].max() < 1e-4


async def test_a_prompt_that_does_not_fit_is_an_error_of_the_request_and_costs_no_worker(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="group long may have 966 tokens"):
        await cluster.sample(group("long", new=960))
    assert all(worker.state is WorkerState.READY for worker in await cluster.healthy())


async def test_what_nobody_waits_for_any_more_is_aborted(cluster: Cluster) -> None:
    await cluster.healthy()
    async with aclosing(cluster.pool.generate(group("abandoned", 64, new=900))) as completions:
        meta, _ = await anext(completions)
    worker = next(worker for worker in cluster.pool.workers() if worker.id == meta.worker)
    async with asyncio.timeout(10):
        while (await worker.actor.stats.remote())["unfinished"]:  # noqa: ASYNC110  another process
            await asyncio.sleep(0.05)
    assert worker.in_flight == 0


async def test_weights_without_one_tensor_are_refused_before_anything_is_touched(cluster: Cluster) -> None:
    worker, _ = await cluster.healthy()
    missing = cluster.next_policy().without("model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(WeightsRefused, match=r"1 missing \(model\.layers\.1\.self_attn\.k_proj\.weight\)"):
        await worker.actor.take_over.remote(missing.manifest, *missing.buckets)
    assert furthest(cluster.policy, await cluster.sample_on(worker, group("still old"))) < 1e-4


async def test_a_native_push_is_attested_by_the_manifest_that_follows_it(cluster: Cluster) -> None:
    """The verbs that vLLM's trainer-side engines call, with bytes from this process instead of a GPU's."""
    await cluster.healthy()
    policy = cluster.policy = cluster.next_policy()
    actors = cluster.pool.push_targets()

    async def all_workers(verb: str, *args: Any) -> None:
        await asyncio.gather(*(getattr(actor, verb).remote(*args) for actor in actors))

    running = asyncio.create_task(cluster.sample(group("during a push", 32, new=900)))
    await asyncio.sleep(0.2)
    await all_workers("start_weight_update")
    with Scratch(max(policy.manifest.bucket_nbytes)) as scratch:
        for number, bucket in enumerate(policy.buckets):
            scratch.write(bucket)
            tensors = [
                (meta.name, meta.dtype, list(meta.shape), meta.offset, meta.nbytes, meta.checksum)
                for meta in policy.manifest.tensors
                if meta.bucket == number
            ]
            info = {"path": scratch.path, "nbytes": bucket.nbytes, "tensors": tensors}
            await all_workers("update_weights", SimpleNamespace(update_info=info))
    await all_workers("finish_weight_update")
    await asyncio.sleep(0.3)
    assert not running.done()  # paused until the manifest
    takeovers = await cluster.pool.update(Published(manifest=policy.manifest, buckets=()))
    assert [takeover.version for takeover in takeovers] == [policy.version] * 2
    assert any(len(meta.spans) == 2 for meta, _ in (await running).values())
    assert furthest(policy, await cluster.sample(group("after a push", 16))) < 1e-4
    with pytest.raises(WeightsRefused, match="none were pushed before"):
        await actors[0].take_over.remote(policy.manifest)


async def test_twenty_updates_leave_no_memory_file_or_process_behind(cluster: Cluster, shm: None) -> None:
    def measures() -> tuple[dict[int, int], dict[int, int], int]:
        processes = [psutil.Process(pid) for worker in workers for pid in (worker.pid, *worker.engine_pids) if pid]
        return (
            {process.pid: process.memory_info().rss for process in processes},
            {process.pid: process.num_fds() for process in processes},
            sum(len(process.children(recursive=True)) for process in processes),
        )

    workers = await cluster.healthy()
    for _ in range(4):
        await cluster.update()
    memory, files, children = measures()
    for _ in range(20):
        await cluster.update()
        await cluster.sample(group("between", 2))
    memory_after, files_after, children_after = measures()
    # The weights are 0.55 MB: one copy kept per update would be 11 MB.
    assert max(memory_after[pid] - memory[pid] for pid in memory) < 8 << 20
    assert max(files_after[pid] - files[pid] for pid in files) <= 2
    assert children_after == children


async def test_a_damaged_byte_is_refused_and_the_worker_is_used_again_only_as_a_new_one(
    cluster: Cluster, shm: None
) -> None:
    broken, other = await cluster.healthy()
    cluster.events()
    damaged = cluster.next_policy().damaged()
    running = asyncio.create_task(cluster.sample_on(broken, group("under way", 16, new=900)))
    await asyncio.sleep(0.3)
    with pytest.raises(WeightsRefused, match="arrived damaged: its checksum is not that of the manifest"):
        await broken.actor.take_over.remote(damaged.manifest, *damaged.buckets)
    with pytest.raises((WeightsRefused, ray.exceptions.RayActorError)):
        await running
    sampled = [await cluster.sample(group(f"meanwhile {i}")) for i in range(4)]
    assert {meta.worker for group in sampled for meta, _ in group.values()} == {other.id}
    assert {worker.id for worker in await cluster.healthy()} == {other.id, f"{broken.id}.1"}
    assert [event["kind"] for event in cluster.events()] == ["worker_lost", "worker_ready"]
    assert not any(psutil.pid_exists(pid) for pid in (broken.pid, *broken.engine_pids))
    renewed = next(worker for worker in cluster.pool.workers() if worker.id != other.id)
    assert furthest(cluster.policy, await cluster.sample_on(renewed, group("renewed", 16))) < 1e-4


async def test_nothing_sampled_under_weights_that_fail_the_canary_leaves_the_worker(cluster: Cluster) -> None:
    await cluster.healthy()
    cluster.events()
    old = cluster.policy
    wrong = cluster.policy = cluster.next_policy()
    finished: list[CompletionMeta] = []

    async def watch(name: str) -> None:
        async for meta, _ in cluster.pool.generate(group(name, 32, new=900)):
            finished.append(meta)

    running = [asyncio.create_task(watch(f"canary {i}")) for i in range(2)]
    await asyncio.sleep(0.5)
    update = asyncio.create_task(cluster.pool.update(wrong.misjudged()))
    assert all(isinstance(e, WorkerLost) for e in await asyncio.gather(*running, return_exceptions=True))
    assert {span.version for meta in finished for span in meta.spans} <= {old.version}
    failures: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while len(failures) < 2:
            event = await cluster.pool.events.get()
            failures += [event] if event["kind"] == "takeover_failed" else []
    assert "failed the canary" in failures[0]["reason"]
    assert "max 1.00e-02" in failures[0]["reason"]
    # Their replacements would fail like them; good weights end it.
    update.cancel()
    await cluster.update()
    await cluster.healthy()


async def test_a_killed_worker_is_told_at_once_and_what_was_missing_comes_out_the_same(
    cluster: Cluster, shm: None
) -> None:
    await cluster.healthy()
    cluster.events()
    request = group("killed", 24, new=900)
    whole = await cluster.sample(request)
    finished: Sampled = {}
    completions = cluster.pool.generate(request)
    meta, ref = await anext(completions)
    finished[meta.sample_index] = (meta, await ref)
    dead = next(worker for worker in cluster.pool.workers() if worker.id == meta.worker)
    assert dead.pid is not None
    os.kill(dead.pid, signal.SIGKILL)
    killed = asyncio.get_running_loop().time()
    with pytest.raises(WorkerLost, match="died"):
        await collect(completions, finished)
    assert asyncio.get_running_loop().time() - killed < 5
    assert 0 < len(finished) < 24
    missing = tuple(sample for sample in request.samples if sample.index not in finished)
    rest = await cluster.sample(
        GroupRequest(
            group_id=request.group_id,
            prompt_token_ids=request.prompt_token_ids,
            samples=missing,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
        )
    )
    assert same(whole, finished | rest)
    newest = await cluster.update()
    renewed = next(worker for worker in await cluster.healthy() if worker.id.startswith(dead.id.split(".")[0]))
    assert renewed.version == newest.version == PolicyVersion(1, cluster.number)
    assert furthest(newest, await cluster.sample_on(renewed, group("renewed", 16))) < 1e-4
    assert not any(psutil.pid_exists(pid) for pid in (dead.pid, *dead.engine_pids))


async def test_a_worker_whose_engine_died_is_lost_like_a_dead_worker(cluster: Cluster) -> None:
    await cluster.healthy()
    cluster.events()
    completions = cluster.pool.generate(group("engine", 24, new=900))
    meta, _ = await anext(completions)
    dead = next(worker for worker in cluster.pool.workers() if worker.id == meta.worker)
    os.kill(dead.engine_pids[0], signal.SIGKILL)
    with pytest.raises(WorkerLost):
        await collect(completions, {})
    again = await cluster.sample(group("engine", 4))
    assert {meta.worker for meta, _ in again.values()} & {dead.id} == set()
    assert [event["kind"] for event in cluster.events()] == ["worker_lost"]


async def test_a_worker_that_cannot_start_says_why(cluster: Cluster, tmp_path: Path) -> None:
    pool = RolloutPool(cluster.spec, str(tmp_path))
    with pytest.raises(ModelError, match=r"rollout-\d cannot load model"):
        await pool.start()
    assert pool.workers() == []


async def test_closing_the_pool_leaves_no_process_even_of_a_worker_that_is_starting(cluster: Cluster) -> None:
    workers = await cluster.healthy()
    cluster.pool.scale(3, 1)
    children: set[int] = set()
    async with asyncio.timeout(120):
        while len(children) < 2:  # the starting actor, and its engine
            await asyncio.sleep(0.1)
            ours = {pid for worker in workers for pid in (worker.pid, *worker.engine_pids)}
            children = await asyncio.to_thread(_of_workers) - ours  # the pool needs the loop to start one
    await cluster.pool.close()
    pids = {pid for worker in workers for pid in (worker.pid, *worker.engine_pids) if pid}
    assert len(pids) == 4
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    async with asyncio.timeout(15):
        while any(psutil.pid_exists(pid) for pid in children):  # noqa: ASYNC110  other processes
            await asyncio.sleep(0.1)


def _of_workers() -> set[int]:
    """This session's rollout actors, and the engines below them."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if "RolloutWorker" in line or "EngineCore" in line:
                found.add(process.pid)
    return found
