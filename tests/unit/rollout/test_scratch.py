"""Shared memory without a name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from sapo_ray.rollout.scratch import Scratch


def test_another_process_reads_what_was_written_last() -> None:
    with Scratch(64) as scratch:
        scratch.write(np.full(64, 1, dtype=np.uint8))
        scratch.write(np.arange(8, dtype=np.uint8))
        read = f"import sys; sys.stdout.buffer.write(open({scratch.path!r}, 'rb').read())"
        seen = subprocess.run([sys.executable, "-c", read], capture_output=True, check=True).stdout
    assert seen == bytes(range(8)) + b"\x01" * 56
    assert not Path(scratch.path).exists()


def test_a_killed_owner_leaves_nothing_in_shared_memory() -> None:
    before = set(os.listdir("/dev/shm"))
    owner = (
        "import numpy as np, time; from sapo_ray.rollout.scratch import Scratch; s = Scratch(1 << 20);"
        "s.write(np.ones(1 << 20, dtype=np.uint8)); print(s.path, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        assert Path(path).stat().st_size == 1 << 20
        process.send_signal(signal.SIGKILL)
    assert not Path(path).exists()
    assert {name for name in set(os.listdir("/dev/shm")) - before if "sapo" in name} == set()
