"""The data folder's disk: can it be reached, and has it room? Asking takes no longer when the answer does."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

import structlog

log = structlog.get_logger("sapo_ray.control")

LOOK_S = 2.0
"""A disk that has not told its free space by then counts as one that cannot be reached, until it does."""


class DataDisk:
    """Looked at by one thread at a time, however many ask: a network file system that hangs holds up nobody else."""

    def __init__(self, folder: Path, min_free_gb: float) -> None:
        self._folder, self._min_free = folder, min_free_gb * 1e9
        self._lock = threading.Lock()
        self._look: Future[int] | None = None
        """Free bytes; under way, or the newest that was."""
        self._said = True

    def usable(self) -> bool:
        """Whether the folder can be reached and has the free space that it must; bounded by LOOK_S."""
        with self._lock:
            look = self._look
            if look is None or look.done():
                look = self._look = Future()
                threading.Thread(target=self._run, args=(look,), name="data disk", daemon=True).start()
        try:
            free = look.result(LOOK_S)
        except TimeoutError:
            return self._tell(usable=False, found=f"no answer within {LOOK_S:g} s")
        except OSError as error:
            return self._tell(usable=False, found=str(error))
        return self._tell(usable=free >= self._min_free, found=f"{free / 1e9:.2f} GB free")

    def _run(self, look: Future[int]) -> None:
        try:
            look.set_result(shutil.disk_usage(self._folder).free)
        except Exception as error:  # noqa: BLE001 - raised again by `result`
            look.set_exception(error)

    def _tell(self, *, usable: bool, found: str) -> bool:
        """Log each change once; who asks over HTTP is not told the figures."""
        with self._lock:
            changed, self._said = self._said != usable, usable
        if changed:
            (log.info if usable else log.warning)("disk", usable=usable, folder=str(self._folder), found=found)
        return usable
