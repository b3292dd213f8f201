"""Ray for one run: a cluster that is there, or a local one that leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ResourceError

ACTOR_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def ray_for(spec: JobSpec, weight_bytes: int, logs: Path) -> Iterator[None]:
    """Connect to RAY_ADDRESS if it is set, else start a local Ray for this run and end it afterwards.

    `weight_bytes` is the size of published weights. A local Ray gets as many logical CPUs as the job has actors: on a
    small machine they share the real ones. Its files live in a temporary folder that is removed; what the actors
    printed is kept in `logs`.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": ACTOR_ENV})
        try:
            yield
        finally:
            ray.shutdown()
        return
    # An auth token in the home directory would switch token authentication on for this private cluster.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Two weight buffers, the payloads of all outstanding groups, and headroom.
    store = max(512 << 20, int(2.2 * weight_bytes) + (256 << 20))
    check_shared_memory(store)
    folder = tempfile.mkdtemp(prefix="sapo-")  # short: the paths of sockets are limited to about 100 characters
    try:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, spec.rollout.workers + spec.learner.ranks + 1),
            object_store_memory=store,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
            runtime_env={"env_vars": ACTOR_ENV},
        )
        yield
    finally:
        ray.shutdown()
        try:
            _keep_logs(Path(folder), logs)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def check_shared_memory(needed: int) -> None:
    """Raise ResourceError unless this machine has memory, and /dev/shm room, for an object store of `needed` bytes."""
    memory = psutil.virtual_memory().available
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else memory
    if needed > min(memory, shm):
        raise ResourceError(
            f"the object store needs {needed / 1e9:.2f} GB for two buffers of weights, but {memory / 1e9:.2f} GB of "
            f"memory and {shm / 1e9:.2f} GB of /dev/shm are free; give the machine or container more shared memory "
            "(docker: --shm-size), or use a smaller model"
        )


def _keep_logs(ray_folder: Path, logs: Path) -> None:
    """Copy what actors and Ray itself printed; empty files are left out."""
    sessions = [path for path in ray_folder.glob("session_*") if path.is_dir() and not path.is_symlink()]
    for session in sessions:
        for file in (session / "logs").glob("*"):
            if file.is_file() and file.stat().st_size and file.name.startswith(("worker-", "raylet", "gcs_server")):
                logs.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, logs / file.name)
