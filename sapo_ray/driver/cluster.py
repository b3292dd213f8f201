"""Ray for one run: a cluster that is there, or a local one that leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import psutil
import ray
from safetensors import SafetensorError, safe_open

from sapo_ray.actor_log import LOG_DIR
from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ModelError, ResourceError
from sapo_ray.temporary import temporary_folder

ACTOR_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def ray_for(spec: JobSpec, weight_bytes: int, logs: Path | None) -> Iterator[None]:
    """Connect to RAY_ADDRESS if it is set, else start a local Ray for this run and end it afterwards.

    `weight_bytes` is the size of published weights. A local Ray gets as many logical CPUs as the job may have actors:
    on a small machine they share the real ones. Its files live in a temporary folder that is removed. The actors write
    what they print to `logs`, on a cluster too; of a local Ray, its own logs are kept there as well.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray prints a traceback for each call that was given up, as of a group that a lost learner had outstanding.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    actor_env = ACTOR_ENV if logs is None else ACTOR_ENV | {LOG_DIR: str(logs.absolute())}
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": actor_env})
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Whoever reaches a Ray cluster can run code in it. With a token, Ray wants it of everybody.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Two weight buffers, the payloads of all outstanding groups, and headroom.
    store = max(512 << 20, int(2.2 * weight_bytes) + (256 << 20))
    check_shared_memory(store)
    # Ray runs its workers at niceness 15: whatever else the machine does would then come before the engines.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with temporary_folder() as folder:
        session = folder / "r"  # a folder below: Ray opens its own to all users
        try:
            ray.init(
                num_cpus=max(os.cpu_count() or 1, spec.rollout.most_workers + spec.learner.ranks + 1),
                object_store_memory=store,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                _temp_dir=str(session),
                runtime_env={"env_vars": actor_env},
            )
            yield
        finally:
            ray.shutdown()
            if logs is not None:
                _keep_logs(session, logs)


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
    """Copy what Ray itself printed, and what workers did before or without a log of their own."""
    sessions = [path for path in ray_folder.glob("session_*") if path.is_dir() and not path.is_symlink()]
    for session in sessions:
        for file in (session / "logs").glob("*"):
            kept = file.name.startswith(("worker-", "raylet", "gcs_server"))
            if kept and file.is_file() and _says_something(file):
                logs.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, logs / file.name)


def _says_something(file: Path) -> bool:
    """Whether there is a line beside those by which Ray tells whose file it is."""
    with file.open("rb") as lines:
        return any(not line.startswith((b":job_id:", b":actor_name:", b":task_name:")) for line in lines)


def published_bytes(folder: Path, dtype: str) -> int:
    """Size of a model folder's weights in the dtype in which they are published. Raises ModelError if damaged."""
    elements = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                elements += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"model.path: {path} is damaged ({error}); fetch or copy it again") from error
    return elements * {"float32": 4, "bfloat16": 2}[dtype]
