"""Is sampling through the pool as fast as a bare vLLM engine? Claim: at least 0.95 of its tokens per second.

One rollout worker behind the pool (attested weights, text decoded, payloads in Ray's object store) against one bare
AsyncLLM in this process: same prompts, seeds and sampling parameters, in turns, in one run; the other engine idles
meanwhile. Ratios are medians over rounds of pairs taken one right after the other, because a shared machine drifts.
CPU seconds are of all processes of either side, the least of all rounds: what a busy machine disturbs least.

    quickstart   the shipped example: warm-started model, prompts `17+25=`, about 21 tokens a completion
    long         the same model untrained, up to 400 tokens, about 100 a completion

    python benchmarks/rollout.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from report import report

from sapo_ray.config.spec import JobSpec
from sapo_ray.data.addition import heldout_pairs, prompt
from sapo_ray.models.builtin import make_addition_model
from sapo_ray.models.publish import publish_folder
from sapo_ray.models.warm_start import warm_start
from sapo_ray.rollout.engine import CPU_ENVIRONMENT, ENVIRONMENT, engine_arguments
from sapo_ray.rollout.pool import RolloutPool
from sapo_ray.temporary import temporary_folder
from sapo_ray.types import GroupRequest, PolicyVersion, Published, SampleRequest, WeightsManifest

Tokens = Callable[[list[GroupRequest]], Awaitable[int]]


@dataclass
class Case:
    """Groups of 16 of one model."""

    name: str
    warm: bool
    groups: int
    max_new_tokens: int

    def model(self, folder: Path) -> Path:
        make_addition_model(folder, 0)
        if self.warm:
            warm_start(folder, 0.15, 0, lambda *_: None)
        return folder

    def requests(self, tokenizer: Any) -> list[GroupRequest]:
        return [
            GroupRequest(
                group_id=f"{self.name}-{number}",
                prompt_token_ids=tuple(tokenizer.encode(prompt(*pair))),
                samples=tuple(SampleRequest(index=i, seed=1000 * number + i) for i in range(16)),
                max_new_tokens=self.max_new_tokens,
                temperature=1.0,
            )
            for number, pair in enumerate(heldout_pairs()[: self.groups])
        ]


CASES = [Case("quickstart", True, 32, 28), Case("long", False, 16, 400)]


def job(folder: Path, case: Case) -> JobSpec:
    return JobSpec.model_validate(
        {
            "steps": 1,
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": [{"path": "builtin:addition"}], "template": "plain", "max_prompt_tokens": 16},
            "rollout": {"max_new_tokens": case.max_new_tokens, "kv_cache_mb": 256},
        }
    )


def bare_engine(spec: JobSpec, folder: Path) -> Any:
    """vLLM with the worker's arguments, but for what weight updates need; as the worker's, it leaves no semaphores."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    ours = ("weight_transfer_config", "scheduling_policy")
    arguments = {key: value for key, value in engine_arguments(spec, str(folder)).items() if key not in ours}
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def through_bare(engine: Any) -> Tokens:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def one(request: GroupRequest, sample: SampleRequest) -> int:
        params = SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=sample.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        text = {"prompt_token_ids": list(request.prompt_token_ids)}
        outputs = engine.generate(text, params, f"{request.group_id}/{sample.index}")
        (output,) = [output async for output in outputs]
        return len(output.outputs[0].token_ids)

    async def sample(requests: list[GroupRequest]) -> int:
        return sum(await asyncio.gather(*(one(request, s) for request in requests for s in request.samples)))

    return sample


def through_pool(pool: RolloutPool) -> Tokens:
    async def one(request: GroupRequest) -> int:
        return sum([meta.tokens async for meta, _ in pool.generate(request)])

    async def sample(requests: list[GroupRequest]) -> int:
        return sum(await asyncio.gather(*map(one, requests)))

    return sample


def cpu_seconds() -> float:
    """Of this process and everything below it: Ray, the worker, both engines."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


async def measure(case: Case, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    from transformers import AutoTokenizer

    with temporary_folder() as scratch:
        folder = case.model(scratch / "model")
        spec = job(folder, case)
        requests = case.requests(AutoTokenizer.from_pretrained(folder))
        canary = tuple(request.prompt_token_ids for request in requests[:4])
        pool, engine = RolloutPool(spec, str(folder)), bare_engine(spec, folder)
        try:
            await engine.collective_rpc("release_semaphore_names")
            await pool.start()
            *buckets, manifest = publish_folder(folder, PolicyVersion(1, 0), "float32", canary)
            assert isinstance(manifest, WeightsManifest)
            await pool.update(Published(manifest=manifest, buckets=tuple(map(ray.put, buckets))))
            ways = {"bare engine": through_bare(engine), "pool": through_pool(pool)}
            return await compare(case, requests, ways, rounds)
        finally:
            await pool.close()
            engine.shutdown()


async def compare(
    case: Case, requests: list[GroupRequest], ways: dict[str, Tokens], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    speed: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    length = 0.0
    for number in range(rounds + 1):
        for way in sorted(ways, reverse=number % 2 == 1):
            busy, began = cpu_seconds(), time.perf_counter()
            tokens = await ways[way](requests)
            seconds = time.perf_counter() - began
            length = tokens / sum(len(request.samples) for request in requests)
            if number:  # the first round warms up
                speed[way].append(tokens / seconds)
                cpu[way].append((cpu_seconds() - busy) / tokens * 1e6)
    rows = [
        {
            "case": case.name,
            "way": way,
            "tokens/completion": round(length, 1),
            "tokens/s": statistics.median(speed[way]),
            "best tokens/s": max(speed[way]),
            "CPU s / 1M tokens": min(cpu[way]),
            "rounds": rounds,
        }
        for way in ways
    ]
    pairs = [pool / bare for pool, bare in zip(speed["pool"], speed["bare engine"], strict=True)]
    return rows, {
        f"{case.name}: pool / bare, median of pairs": statistics.median(pairs),
        f"{case.name}: pool / bare, best of each": max(speed["pool"]) / max(speed["bare engine"]),
        f"{case.name}: CPU of pool / bare": min(cpu["pool"]) / min(cpu["bare engine"]),
    }


async def main(rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for case in CASES:
        more_rows, more_ratios = await measure(case, rounds)
        rows, ratios = rows + more_rows, ratios | more_ratios
    report("rollout", rows, ratios)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    os.environ.update(CPU_ENVIRONMENT | ENVIRONMENT)
    with temporary_folder() as scratch:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=str(scratch / "r"))
        asyncio.run(main(arguments.rounds))
        ray.shutdown()
