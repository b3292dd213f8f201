"""A bucket's way from one process to another on the same node, leaving nothing behind."""

from __future__ import annotations

import mmap
import os
from types import TracebackType

import numpy as np
import numpy.typing as npt


class Scratch:
    """Anonymous shared memory for one bucket at a time, readable by other processes of this user through `path`.

    It has no name in any file system, so the kernel frees it with its last user, however that one ends.
    """

    def __init__(self, nbytes: int) -> None:
        self._fd = os.memfd_create("sapo-ray-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, nbytes)
        self._map = mmap.mmap(self._fd, nbytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, bucket: npt.NDArray[np.uint8]) -> None:
        """Copy a bucket (uint8 [n], n at most the size) to the start."""
        np.frombuffer(self._map, dtype=np.uint8)[: bucket.size] = bucket

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._map.close()
        os.close(self._fd)
