"""One sum over all ranks, each a process of its own: do GPUs and machines reach each other?

    python -m sapo_ray.doctor.ping RANK WORLD HOST:PORT nccl|gloo

The process is ended when its time is over: NCCL hangs for minutes where a network lets connections through and no data.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Literal

from sapo_ray.doctor.findings import Finding

Backend = Literal["nccl", "gloo"]
NUMBERS = 16 << 20
"""Of four bytes, summed on GPUs; a sixteenth of it on CPUs."""
BOUND_S = 120.0
"""For all ranks to start (the first import of torch takes long), to meet, and to sum."""
MEET_S = 60.0
REMEDY = (
    "let the nodes reach each other on all ports (NetworkPolicy, firewall); name the right interface with "
    "NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on CPUs); NCCL_DEBUG=INFO says more; is /dev/shm large enough?"
)


def start_rank(
    rank: int, world: int, address: str, backend: Backend, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """One rank's process; `address` is where rank 0 listens."""
    command = [sys.executable, "-m", "sapo_ray.doctor.ping", str(rank), str(world), address, backend]
    return subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[bool, str]:
    """Whether a rank got the right sum, and its last line; it is killed when its time is over."""
    try:
        output, _ = process.communicate(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False, f"did not end within {BOUND_S:.0f} s"
    lines = output.strip().splitlines() or ["(printed nothing)"]
    return process.returncode == 0, lines[-1][-300:]


def check_nccl_here(count: int, backend: Backend = "nccl") -> Finding:
    """A sum over the GPUs of this machine, one process each."""
    if count == 0:
        return Finding(check="nccl", status="skipped", detail="no GPU here")
    deadline = time.monotonic() + BOUND_S
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with ExitStack() as started:
        processes = []
        for rank in range(count):
            process = start_rank(rank, count, address, backend, _one_gpu(rank) if backend == "nccl" else None)
            started.callback(_end, process)
            processes.append(process)
        ends = [finish(process, deadline - time.monotonic()) for process in processes]
    return finding(ends, backend, f"{count} {'GPUs' if backend == 'nccl' else 'processes'}", "here")


def finding(ends: list[tuple[bool, str]], backend: Backend, among: str, where: str) -> Finding:
    """What the ranks' ends say together."""
    bad = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(ends) if not good]
    if bad:
        detail = f"{backend} among {among} failed: {'; '.join(bad[:4])}"
        return Finding(check="nccl", status="failed", detail=detail, remedy=REMEDY, where=where)
    return Finding(check="nccl", status="ok", detail=f"{backend} among {among}: {ends[0][1]}", where=where)


def free_port(host: str) -> int:
    """A port of this machine that is free now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


def _one_gpu(rank: int) -> dict[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[rank] if visible else str(rank)}


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def main(rank: int, world: int, address: str, backend: Backend) -> None:
    """Meet the others, sum twice (the first sets connections up), and print how fast the second was."""
    import torch
    from torch import distributed

    distributed.init_process_group(
        backend,
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=MEET_S),
    )
    try:
        device = "cuda" if backend == "nccl" else "cpu"
        numbers = NUMBERS if backend == "nccl" else NUMBERS // 16
        for _ in range(2):
            sent = torch.full((numbers,), float(rank + 1), device=device)
            started = time.monotonic()
            distributed.all_reduce(sent)
            least, most = float(sent.min()), float(sent.max())  # waits for the device
            seconds = time.monotonic() - started
    finally:
        distributed.destroy_process_group()
    right = world * (world + 1) / 2
    if (least, most) != (right, right):
        sys.exit(f"the sum is wrong: {least} to {most}, not {right}")
    print(f"a sum of {numbers * 4 >> 20} MiB took {seconds * 1000:.1f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], "nccl" if sys.argv[4] == "nccl" else "gloo")
