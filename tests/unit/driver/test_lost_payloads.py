"""Samples that were graded, and then went with the node that held them: a re-issue, and no more."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes import Bench, FakeLearner, FakePayloads, job

from sapo_ray.errors import PayloadLost

NO_CHECKPOINTS = {"every": 0, "min_free_gb": 0}


@dataclass
class Node(FakeLearner):
    """A learner; while it is asked to train on step `dies_at`, a node dies with the payloads of `held` prompts."""

    payloads: FakePayloads = field(default_factory=FakePayloads)
    dies_at: int = 0
    held: tuple[str, ...] = ()
    refused: int = 0

    async def train(self, step: int, samples: list[Any]) -> Any:
        if step == self.dies_at and not self.refused:
            self.payloads.gone += [sample.payload for sample in samples if sample.group_id in self.held]
        if await self.payloads.lost([[sample.payload for sample in samples]]):
            self.refused += 1
            raise PayloadLost("samples went with the node that held them")
        return await super().train(step, samples)


def bench(folder: Path, spec: Any, **node: Any) -> Bench:
    folder.mkdir(parents=True, exist_ok=True)
    payloads = FakePayloads()
    return Bench(folder, spec, learner=Node(payloads=payloads, **node), payloads=payloads)


@pytest.mark.parametrize("staleness", [0, 1])
async def test_samples_lost_before_the_learner_had_them_are_sampled_again_in_their_place(
    tmp_path: Path, staleness: int
) -> None:
    spec = job(rollout__max_staleness=staleness, checkpoint=NO_CHECKPOINTS)
    whole = bench(tmp_path / "whole", spec)
    await whole.attempt()
    lossy = bench(tmp_path / "lossy", spec, dies_at=2, held=("t:5:0", "t:6:0"))
    await lossy.attempt()
    assert lossy.learner.trained == whole.learner.trained
    assert (lossy.learner.restarts, lossy.learner.refused) == (0, 1)  # type: ignore[attr-defined]
    again = lossy.journal("reissued")
    assert [(line["group"], line["delivered"], line["missing"]) for line in again] == [
        ("t:5:0", 0, [0, 1, 2, 3]),
        ("t:6:0", 0, [0, 1, 2, 3]),
    ]
    assert all(line["reason"] == "its samples were graded, and then lost with their node" for line in again)
    graded = [line["group"] for line in lossy.journal("graded")]
    assert [graded.count(f"t:{i}:0") for i in (4, 5, 6, 7)] == [1, 2, 2, 1]


async def test_what_is_lost_while_a_checkpoint_is_written_is_not_in_it_and_comes_again(tmp_path: Path) -> None:
    spec = job(rollout__max_staleness=1, checkpoint={"every": 2, "min_free_gb": 0})
    lossy = bench(tmp_path, spec)
    save = lossy.learner.save

    async def dies(folder: Path) -> None:
        await save(folder)
        if lossy.learner.number == 2:
            while "t:8:0" not in held:  # noqa: ASYNC110 - the driver has no event for it
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # it is graded, and waits for the next step
            lossy.payloads.gone += held["t:8:0"]

    held: dict[str, list[Any]] = {}
    grade = lossy.verifiers.grade

    async def graded(prompt: str, gold: str, payloads: list[Any]) -> Any:
        held.setdefault(f"t:{gold}:0", []).extend(payloads)
        return await grade(prompt, gold, payloads)

    lossy.verifiers.grade = graded  # type: ignore[method-assign]
    lossy.learner.save = dies  # type: ignore[method-assign]
    await lossy.attempt()
    written = json.loads((tmp_path / "checkpoints" / "step-000002" / "driver.json").read_text())["outstanding"]
    assert {item["prompt"]["id"]: item["complete"] for item in written}["t:8:0"] is False
    assert [line["group"] for line in lossy.journal("reissued")] == ["t:8:0"]
    assert len(lossy.learner.trained) == 3


async def test_a_loss_that_cannot_be_found_is_raised(tmp_path: Path) -> None:
    lossy = bench(tmp_path, job(checkpoint=NO_CHECKPOINTS), dies_at=2, held=("t:5:0",))

    async def finds_nothing(groups: list[list[Any]]) -> list[int]:
        return []

    async def refuses(step: int, samples: list[Any]) -> Any:
        raise PayloadLost("samples went with the node that held them")

    lossy.payloads.lost = finds_nothing  # type: ignore[method-assign]
    lossy.learner.train = refuses  # type: ignore[method-assign]
    with pytest.raises(PayloadLost):
        await lossy.attempt()
