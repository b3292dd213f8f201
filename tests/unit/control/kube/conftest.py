"""Fixtures of the tests of jobs' own clusters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kube_world import KubeWorld, kube_world


@pytest.fixture
def kube(tmp_path: Path) -> Iterator[KubeWorld]:
    with kube_world(tmp_path) as world:
        yield world
