"""Fixtures of the reconciler's tests."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from reconciler_world import Clock, World

from sapo_ray.control.store import Store


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the store too, which asks time.time()."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture
def world(store: Store, clock: Clock, tmp_path: Path) -> World:
    return World(store, clock, tmp_path / "runs")
