"""A tracker that may be slow, unreachable or broken, kept away from training.

    event loop --log()--> bounded queue --> one thread --> the tracker (a network, somebody else's code)

`log` never waits and never raises. Rows that find the queue full are counted and left out; the first trouble of a run
is told once, and what was lost is told at the end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from sapo_ray.driver.parts import Tracker

CAPACITY = 1000
"""Rows waiting at most; a row is a step's metrics, a few kB."""
CLOSE_S = 60.0
"""What is left at the end may take so long, then it is given up."""

Row = tuple[int, dict[str, float]]


class BackgroundTracker:
    """Runs a tracker in a thread of its own, opening it included.

    Args:
        name: for messages, e.g. `MLflow (logging.mlflow_uri)`.
        open_tracker: called in the thread; again at the next row if it raised.
        warn: called with a sentence, always in the thread of `log` and `close`.
    """

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        warn: Callable[[str], None],
        *,
        capacity: int = CAPACITY,
        close_s: float = CLOSE_S,
    ) -> None:
        self._name = name
        self._open = open_tracker
        self._warn = warn
        self._close_s = close_s
        self._rows: queue.Queue[Row | None] = queue.Queue(capacity)
        self._trouble = ""
        """The first one, set by the thread."""
        self._warned = False
        self._logged = 0
        self._delivered = 0
        """Counted by the thread."""
        self._abandoned = threading.Event()
        # A daemon: a call that never comes back must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hand a row over; at once, whatever the tracker does."""
        self._logged += 1
        try:
            self._rows.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._tell(f"takes no rows; {self._rows.maxsize} are waiting and further ones are left out")
        if self._trouble:
            self._tell(self._trouble)

    def rewind(self, step: int) -> None:
        """Nothing: a service keeps what it was given, and shows the newest row of a step."""

    def close(self) -> None:
        """Let the thread finish, bounded, and say what did not arrive."""
        deadline = time.monotonic() + self._close_s
        try:
            self._rows.put(None, timeout=self._close_s)
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        stuck = self._thread.is_alive()
        self._abandoned.set()
        if self._trouble:
            self._tell(self._trouble)
        if lost := self._logged - self._delivered:
            self._warn(f"{self._name}: {lost} rows did not arrive; metrics.jsonl and TensorBoard have them")
        elif stuck:
            self._warn(f"{self._name}: could not be closed within {self._close_s:g} s")

    def _tell(self, trouble: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"{self._name}: {trouble}; training goes on without it")

    def _run(self) -> None:
        tracker: Tracker | None = None
        while (row := self._rows.get()) is not None and not self._abandoned.is_set():
            try:
                tracker = tracker or self._open()
                tracker.log(*row)
                self._delivered += 1
            except Exception as error:  # noqa: BLE001 - somebody else's client: whatever it raises is told, never raised
                self._trouble = self._trouble or f"{type(error).__name__}: {error}"
        if tracker is not None and not self._abandoned.is_set():
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - as above
                self._trouble = self._trouble or f"{type(error).__name__}: {error}"
