"""The worker's own tasks, with an engine that does what the test says."""

from __future__ import annotations

import asyncio

import pytest

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import WorkerLost
from sapo_ray.rollout import worker as workers
from sapo_ray.rollout.worker import RolloutWorker


class Engine:
    """Well until its `errored` is set; an exception there is raised."""

    def __init__(self) -> None:
        self.state: bool | Exception = False

    @property
    def errored(self) -> bool:
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


def watched(engine: Engine) -> RolloutWorker:
    spec = JobSpec.model_validate({"steps": 1, "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}})
    worker = RolloutWorker(spec, "m", "rollout-0")
    worker._engine = engine
    worker._watch = asyncio.create_task(worker._watch_engine())
    return worker


@pytest.mark.parametrize(
    ("state", "said"),
    [(True, "the engine of rollout-0 died"), (AttributeError("no such field"), "cannot be watched: AttributeError")],
)
async def test_a_worker_whose_engine_died_or_cannot_be_watched_says_so(
    monkeypatch: pytest.MonkeyPatch, state: bool | Exception, said: str
) -> None:
    monkeypatch.setattr(workers, "_WATCH_S", 0.001)
    engine = Engine()
    worker = watched(engine)
    broken = asyncio.create_task(worker.until_broken())
    await asyncio.sleep(0.01)
    assert not broken.done()
    engine.state = state
    with pytest.raises(WorkerLost, match=said):
        await asyncio.wait_for(broken, 1)
