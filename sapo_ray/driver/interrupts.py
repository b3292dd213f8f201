"""Ctrl-C and SIGTERM: the first one ends a run in order, and no further one keeps it from doing so."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_S = 10.0
"""A run that has not begun to end so long after it was told to is told again by the next signal."""
WAIT = b"ending, please wait: what was started is being closed\n"


class Interrupts:
    """What signals do to one run, from its first moment to its last.

    before and between     what they did before: raise KeyboardInterrupt
    while the loop runs    cancel its main task, once
    while it ends          nothing but a line on standard error
    """

    def __init__(self) -> None:
        self._by: signal.Signals | None = None
        """The one that ended the run."""
        self._at = 0.0
        self._ending = False
        self._main: tuple[asyncio.AbstractEventLoop, asyncio.Task[object]] | None = None
        self._woken: socket.socket | None = None
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    @contextmanager
    def heard(self) -> Iterator[Interrupts]:
        """Take signals over while the body runs. A run that Ctrl-C cancelled ends as KeyboardInterrupt.

        Only the main thread may hear signals: in any other the body simply runs.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        with _wakeup() as self._woken:
            self._listen()
            try:
                yield self
            except asyncio.CancelledError:
                if self._by is signal.SIGINT:
                    raise KeyboardInterrupt from None
                raise
            finally:
                for number, handler in self._before.items():
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def cancel_here(self) -> None:
        """In the event loop, inside `heard`: from here on signals cancel the current task."""
        task = asyncio.current_task()
        assert task is not None
        self._main = asyncio.get_running_loop(), task
        if self._woken is not None:
            self._listen()
            self._main[0].add_reader(self._woken, self._woken.recv, 4096)

    def ending(self) -> None:
        """From here on nothing is broken off any more: every wait that is left has a bound."""
        self._ending = True

    def go_on(self) -> None:
        """What follows may be broken off again, until `ending`."""
        self._ending = False

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._ending or (self._by is not None and now - self._at < AGAIN_S):
            os.write(2, WAIT)  # not print: this may be in the midst of one
            return
        loop, task = self._main or (None, None)
        if loop is not None and task is not None and not loop.is_closed():
            self._by, self._at = signal.Signals(number), now
            loop.call_soon_threadsafe(task.cancel)
            return
        before = self._before[number]
        if not callable(before):
            raise KeyboardInterrupt
        before(number, frame)


@contextmanager
def _wakeup() -> Iterator[socket.socket]:
    """Readable after a signal: one that comes just before the loop goes to sleep would else wait for its next event."""
    woken, writer = socket.socketpair()
    with woken, writer:
        woken.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield woken
        finally:
            signal.set_wakeup_fd(before)
