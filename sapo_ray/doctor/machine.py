"""This machine's shared memory and GPUs."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from sapo_ray.doctor.findings import Finding

LEAST_SHM = 1 << 30
"""Bytes. Ray's object store and the published weights lie there; containers have 64 MiB unless told otherwise."""
SHARE_OF_MEMORY = 0.3
"""What Ray's object store takes of the memory where nothing is said; with less it spills to disk."""
SMI_S = 30.0
CUDA = "nvidia-cuda-runtime"
LEAST_DRIVER = {12: 525, 13: 580}
"""Driver branch by CUDA's major version (NVIDIA, CUDA compatibility, minor version compatibility)."""


def check_shm(where: str = "here", folder: str = "/dev/shm", store: int | None = None) -> Finding:
    """Size of the shared memory. `store`: bytes of the object store that a Ray has there; None where none runs yet."""
    remedy = "docker: --shm-size=8g; Kubernetes: an emptyDir with medium Memory and a sizeLimit, mounted at /dev/shm"
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return Finding(check="shm", status="failed", detail=f"{folder}: {error.strerror}", remedy=remedy, where=where)
    total, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    detail = f"{folder} has {total >> 20} MiB, {free >> 20} MiB free"
    if (free if store is None else total) < LEAST_SHM:
        detail += f"; at least {LEAST_SHM >> 20} MiB must be"
        return Finding(check="shm", status="failed", detail=detail, remedy=remedy, where=where)
    if store is not None:
        if store <= total:
            detail += f"; Ray's objects may take {store >> 20} MiB"
            return Finding(check="shm", status="ok", detail=detail, where=where)
        detail += f"; Ray's objects may take {store >> 20} MiB, more than there is, so that they lie on disk"
        remedy += ", or a smaller --object-store-memory of `ray start`"
        return Finding(check="shm", status="warning", detail=detail, remedy=remedy, where=where)
    memory = memory_bytes()
    if total < SHARE_OF_MEMORY * memory:
        detail += f"; that is less than three tenths of the memory ({memory >> 20} MiB), so Ray may spill to disk"
        return Finding(check="shm", status="warning", detail=detail, remedy=remedy, where=where)
    return Finding(check="shm", status="ok", detail=detail, where=where)


def memory_bytes() -> int:
    """Of the machine, or of the container where that has less (control groups, version 2)."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def gpus() -> list[tuple[str, str]]:
    """Name and driver version of each GPU. Raises FileNotFoundError without NVIDIA's tools, OSError if they fail."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"nvidia-smi did not end within {SMI_S:.0f} s") from error
    if done.returncode != 0:
        raise OSError(f"nvidia-smi: {(done.stdout + done.stderr).strip()[-300:]}")
    rows = [line.split(",") for line in done.stdout.splitlines() if "," in line]
    return [(row[0].strip(), row[1].strip()) for row in rows]


def check_gpu(expected: int | None, where: str = "here") -> Finding:
    """GPUs and driver. `expected`: how many there must be; None if not known, 0 if jobs are to run on CPUs."""
    try:
        found = gpus()
    except FileNotFoundError:
        found = []
    except OSError as error:
        remedy = "the driver does not answer: look at `dmesg` on the node, reset or replace it"
        return Finding(check="gpu", status="failed", detail=str(error), remedy=remedy, where=where)
    if len(found) < (expected or 0):
        detail = f"{len(found)} GPUs are seen, {expected} must be"
        remedy = (
            "does the node have a driver and NVIDIA's container toolkit, does the pod ask for nvidia.com/gpu "
            "(docker: --gpus all), and is the device plugin installed?"
        )
        return Finding(check="gpu", status="failed", detail=detail, remedy=remedy, where=where)
    if not found:
        return Finding(check="gpu", status="skipped", detail="no GPU, and none was asked for", where=where)
    names = ", ".join(sorted({name for name, _ in found}))
    detail = f"{len(found)} x {names}, driver {found[0][1]}"
    try:
        cuda = version(CUDA)
    except PackageNotFoundError:
        remedy = "run the GPU image (worker-gpu), or `make setup GPU=1`, if jobs are to use them"
        detail += "; this environment has no CUDA"
        return Finding(check="gpu", status="warning", detail=detail, remedy=remedy, where=where)
    least = LEAST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if int(found[0][1].split(".")[0]) < least:
        detail += f"; CUDA {cuda} needs {least} or newer"
        remedy = f"install driver {least} or newer on the node"
        return Finding(check="gpu", status="failed", detail=detail, remedy=remedy, where=where)
    return Finding(check="gpu", status="ok", detail=detail, where=where)
