from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server_stand_in import Kubernetes
from chart_rendering import FEATURES, render


@pytest.fixture
def kube(tmp_path: Path) -> Iterator[Kubernetes]:
    """An API server with all that a release has installed whose jobs have clusters of their own."""
    kube = Kubernetes(tmp_path)
    kube.install(render(FEATURES["per_job"]))
    yield kube
    kube.close()
