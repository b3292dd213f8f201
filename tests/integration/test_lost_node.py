"""A node dies with finished samples in its object store, after they were graded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from learner_probe import Learners, job, make_samples

from sapo_ray.driver.payloads import RayPayloads, load_payloads
from sapo_ray.errors import PayloadLost
from sapo_ray.types import CompletionPayload, TrainSample

pytestmark = pytest.mark.integration

LARGE = "x" * 300_000
"""Ray keeps what is smaller in the process that asked for it."""


@ray.remote(num_cpus=0)
class Sampler:
    """Has payloads in its node's object store, as a rollout worker has."""

    def payloads(self, payloads: list[CompletionPayload]) -> Iterator[CompletionPayload]:
        for payload in payloads:
            yield dataclasses.replace(payload, text=LARGE)


@pytest.fixture
def node(ray_session: None) -> Iterator[subprocess.Popen[bytes]]:
    """A second node of the session's Ray, with the resource `doomed`."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--block", "--num-cpus=0"]
    options = ["--resources", json.dumps({"doomed": 1}), f"--object-store-memory={100 << 20}", "--disable-usage-stats"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while "doomed" not in ray.cluster_resources():
        assert time.monotonic() < end, "the second node did not come up within 60 s"
        time.sleep(0.2)
    yield process
    kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            if one.is_running():
                one.kill()
        process.wait(30)


async def test_samples_that_a_node_takes_with_it_are_named_and_cost_no_learner(
    learners: Learners, node: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    group = await learners.with_job(job(learners.model, zero_stage=2, ranks=2))
    samples = make_samples()
    theirs = [i for i, sample in enumerate(samples) if sample.group_id == samples[0].group_id]
    sampler = Sampler.options(resources={"doomed": 0.1}).remote()  # type: ignore[attr-defined]
    made = [ray.get(samples[i].payload) for i in theirs]
    refs = list(sampler.payloads.options(num_returns="streaming").remote(made))
    moved: list[TrainSample] = list(samples)
    for i, ref in zip(theirs, refs, strict=True):
        moved[i] = dataclasses.replace(samples[i], payload=ref)
    groups = [refs, [sample.payload for i, sample in enumerate(samples) if i not in theirs]]
    payloads = RayPayloads()
    assert await payloads.lost(groups) == []
    kill(node)

    assert await payloads.lost(groups) == [0]
    with pytest.raises(PayloadLost, match=r"payloads\.npz cannot be written: finished samples went with the node"):
        await payloads.save(tmp_path / "payloads.npz", [*groups[1], *refs])
    pids = group.pids()
    with pytest.raises(PayloadLost, match=r"step 1: learner load_batch .* went with the node that held them"):
        await group.train(1, moved)
    assert not group.lost

    report = await group.train(1, samples)
    assert report.updates >= 1
    assert group.pids() == pids
    assert all(psutil.pid_exists(pid) for pid in pids)
    await payloads.save(tmp_path / "payloads.npz", groups[1])
    kept: Any = load_payloads(str(tmp_path / "payloads.npz"), len(groups[1]))
    assert np.array_equal(kept[0].token_ids, ray.get(groups[1][0]).token_ids)
