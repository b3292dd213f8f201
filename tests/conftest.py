"""Fixtures shared by all tests. Expensive parts (Ray, models) are made once a session."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

pytest_plugins = ["databases"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise Ray keeps one in the home directory
# Drawn examples are about what is true, not about how fast this machine is.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in the background of a shell: what tests start would inherit that, and never hear a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


ENGINES = ("tests/chaos/", "tests/gpu/", "tests/integration/")
"""Where tests with real engines are."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Servers of PostgreSQL are for the whole suite; the quick one has SQLite. Among processes, engines come first."""
    for item in items:
        if "[postgresql" in item.nodeid:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # one of several processes
        items.sort(key=lambda item: not item.nodeid.startswith(ENGINES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` one process runs all tests with real engines, which share a Ray; the others go file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class EnginesTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "engines" if nodeid.startswith(ENGINES) else nodeid.partition("::")[0]

    return EnginesTogether(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference files that may lie beside the checkout; tests on them skip where they are absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "vectors").is_dir():
        pytest.skip("no ../shared beside this checkout: tests on its reference files are skipped")
    return path


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for all tests of a session."""
    import ray

    from sapo_ray.temporary import temporary_folder

    # Socket paths are limited to about 100 characters, so not under pytest's long temporary path.
    with temporary_folder() as folder:
        ray.init(
            num_cpus=16,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=1 << 30,
            _temp_dir=str(folder / "r"),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}},
        )
        yield
        ray.shutdown()
