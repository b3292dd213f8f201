"""How long do new weights take from the learners into the engines, ready to sample, against a plain memory copy?

Two learner ranks publish through Ray's object store to rollout workers; a round ends when every worker has taken the
weights over and passed its canary. Compared with copying the same bytes once in memory, in the same run. `peak` is
what a learner process held beyond its shards; learner.bucket_mb (256 MiB) bounds it.

    python benchmarks/weights.py [--rounds 5] [--workers 1] [--models tiny 100M] [--stages 2 3]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import report

from sapo_ray.temporary import temporary_folder

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
CANARY = tuple(tuple(range(5 + 8 * k, 21 + 8 * k)) for k in range(4))


def make_model(name: str, folder: Path) -> Path:
    """`tiny`: builtin:addition, 138k parameters; `100M`: 100.7M, untied, random weights."""
    from sapo_ray.models.builtin import make_addition_model

    make_addition_model(folder, 0)
    if name == "tiny":
        return folder
    from transformers import AutoConfig, Qwen2ForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.update(
        {
            "vocab_size": 16_384,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "layer_types": ["full_attention"] * 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
        }
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def copy_seconds(nbytes: int, rounds: int) -> float:
    """One copy of as many bytes from memory to memory, the target touched before."""
    import numpy as np

    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    return median_of(rounds, lambda: np.copyto(target, source))


def median_of(rounds: int, work: Callable[[], Any]) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def measure(name: str, folder: Path, stage: int, workers: int, rounds: int) -> dict[str, Any]:
    """One row: medians over rounds after a first one that is left out."""
    from sapo_ray.config.spec import JobSpec
    from sapo_ray.learner.group import LearnerGroup
    from sapo_ray.rollout.pool import RolloutPool
    from sapo_ray.types import PolicyVersion

    spec = JobSpec.model_validate(
        {
            "steps": 1,
            "model": {"path": str(folder), "dtype": "bfloat16"},
            "data": {"train": [{"path": "none"}], "max_prompt_tokens": 64},
            "rollout": {"workers": workers, "max_new_tokens": 64, "kv_cache_mb": 64, "max_num_seqs": 16},
            "learner": {"ranks": 2, "zero_stage": stage},
        }
    )
    learners, pool = LearnerGroup(spec, str(folder)), RolloutPool(spec, str(folder))
    try:
        await learners.start()
        await pool.start()
        await learners.set_canary(CANARY)
        seconds = []
        for number in range(rounds + 1):
            started = time.perf_counter()
            published = await learners.publish(PolicyVersion(1, number))
            between = time.perf_counter()
            await pool.update(published)
            seconds.append((between - started, time.perf_counter() - between))
        publish, takeover = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
        # The canary is a forward pass on the learner's side, slow in bfloat16 on CPUs without units for it.
        await learners.set_canary(())
        bare = []
        for number in range(rounds):
            started = time.perf_counter()
            await learners.publish(PolicyVersion(2, number))
            bare.append(time.perf_counter() - started)
        nbytes = sum(published.manifest.bucket_nbytes)
        copied = copy_seconds(nbytes, rounds)
        return {
            "model": name,
            "parameters": learners.ranks[0].parameters,
            "ZeRO": stage,
            "workers": workers,
            "MB": nbytes / 1e6,
            "publish s": publish,
            "of it canary s": publish - statistics.median(bare),
            "takeover s": takeover,
            "ready s": publish + takeover,
            "MB/s": nbytes / 1e6 / (publish + takeover),
            "copy s": copied,
            "ready / copy": (publish + takeover) / copied,
            "peak MB": max(await learners.peak_publish_bytes()) / 1e6,
        }
    finally:
        await learners.close()
        await pool.close()


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["tiny", "100M"], choices=["tiny", "100M"])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3])
    arguments = parser.parse_args()
    rows = []
    with temporary_folder() as folder:
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=2 << 30,
            _temp_dir=str(folder / "r"),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}},
        )
        for name in arguments.models:
            model = make_model(name, folder / name)
            rows += [
                asyncio.run(measure(name, model, stage, arguments.workers, arguments.rounds))
                for stage in arguments.stages
            ]
        ray.shutdown()
    report("weights", rows, {f"{r['model']} ZeRO-{r['ZeRO']}: ready / copy": r["ready / copy"] for r in rows})


if __name__ == "__main__":
    main()
