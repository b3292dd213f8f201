"""Fixtures of tests with real engines: a tiny model, and learner ranks that are started once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from learner_probe import Learners

from sapo_ray.audit import audit
from sapo_ray.models.builtin import make_addition_model


@pytest.fixture(autouse=True)
def every_run_is_audited(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to a run: nothing is lost, doubled, too old, or under weights that nobody took over."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None  # before it is gone
    yield
    if folder is not None:
        for journal in folder.rglob("journal.jsonl"):
            assert audit(journal.parent).findings == [], journal


@pytest.fixture(scope="session")
def addition_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the untrained 138k-parameter model, seed 0."""
    folder = tmp_path_factory.mktemp("addition_model")
    make_addition_model(folder, 0)
    return folder


@pytest.fixture(scope="session")
def learners(ray_session: None, addition_model: Path) -> Iterator[Learners]:
    """Groups of one and of two learner ranks whose engines can be made anew without starting processes."""
    learners = Learners(addition_model)
    yield learners
    asyncio.run(learners.close())
