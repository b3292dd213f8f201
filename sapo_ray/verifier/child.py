"""The parent's end of one grading process: start, send, receive with a bound, kill, reap."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import ConfigError, DeadlineExceeded, ResourceError, WorkerLost
from sapo_ray.verifier.process import EXIT_MEMORY, LENGTH, frame

log = logging.getLogger(__name__)

START_S = 60.0
"""Bound of a start, imports of a reward function included (a process without one is ready in about 1 s)."""
PING_S = 5.0
"""Bound of an idle process's sign of life."""
REAP_S = 10.0
"""Bound of the wait for a killed process to be gone."""
LATE_S = 0.02
"""Before a process is judged late, what it may have written while this loop was busy is read."""
MAX_FRAME = 1 << 20
"""A longer answer, in bytes, is not ours: the process is no longer itself."""


class ProcessDied(Exception):
    """A grading process ended by itself; the text says how."""


class GradingProcess(asyncio.Protocol):
    """One child, owned by one task at a time. Frames arrive in order and are kept until they are received."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen
        self.tired = False
        self.gone = asyncio.get_running_loop().create_future()
        """Done when the child has closed its pipe."""
        self._buffer = bytearray()
        self._frames: deque[dict[str, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._reader: asyncio.ReadTransport | None = None
        self._writer: asyncio.WriteTransport | None = None

    @classmethod
    async def launch(cls, spec: VerifierSpec, *, shortcuts: bool = True) -> GradingProcess:
        """A process that has passed its self-check.

        Raises:
            ConfigError: the reward function cannot be used.
            ResourceError: the process cannot live within verifier.memory_mb.
            WorkerLost: it ended while starting.
            DeadlineExceeded: it was not ready within START_S.
        """
        settings = {"parent": os.getpid(), "shortcuts": shortcuts, "spec": spec.model_dump(mode="json")}
        # -P: no module of the working directory may take the place of one of the standard library.
        command = [sys.executable, "-P", "-m", "sapo_ray.verifier.process", json.dumps(settings)]
        popen = subprocess.Popen(  # noqa: ASYNC220 - returns once the child has started, in milliseconds
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=_environment(),
            start_new_session=True,  # a group of its own: what a reward function starts dies with it
        )
        child = cls(popen)
        try:
            await child._connect()
            await child._wait_until_ready(spec)
        except BaseException:
            child.kill()
            await child.reap()
            raise
        return child

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return not self.gone.done()

    async def _connect(self) -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        loop = asyncio.get_running_loop()
        reader, _ = await loop.connect_read_pipe(lambda: self, self.popen.stdout)
        writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self.popen.stdin)
        self._reader, self._writer = reader, writer

    async def _wait_until_ready(self, spec: VerifierSpec) -> None:
        try:
            message = await self.receive(START_S)
        except ProcessDied as error:
            raise WorkerLost(
                f"a grading process ended while starting ({error}); if verifier.memory_mb = {spec.memory_mb} is small "
                "raise it, and see its standard error"
            ) from error
        if message is None:
            raise DeadlineExceeded(
                f"a grading process was not ready after {START_S:.0f} s; does importing verifier.reward = "
                f"{spec.reward} hang?"
            )
        if "ready" in message:
            return
        kind, text = message["failed"], message["message"]
        if kind == "config":
            raise ConfigError(text)
        raise ResourceError(f"a grading process cannot start: {text}; raise verifier.memory_mb")

    # Protocol of the pipe

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME:
                self.kill()
                break
            end = LENGTH.size + size
            if len(self._buffer) < end:
                break
            try:
                self._frames.append(dict(json.loads(self._buffer[LENGTH.size : end])))
            except (ValueError, TypeError):  # not what our side writes: a reward function wrote into the pipe
                self.kill()
                break
            del self._buffer[:end]
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.gone.done():
            self.gone.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What the owner calls

    def send(self, requests: Sequence[Sequence[Any]]) -> None:
        """Queues requests; never waits. A child that does not read is found out by its deadline."""
        assert self._writer is not None
        if not self._writer.is_closing():
            self._writer.write(b"".join(frame(request) for request in requests))

    async def answers(self) -> bool:
        """Is an idle process well? It may have been killed a moment ago without our knowing yet."""
        self.send([(0, "ping", "", "", "")])
        try:
            return await self.receive(PING_S) is not None
        except ProcessDied:
            return False

    async def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next frame, or None when there was none within the time.

        Raises:
            ProcessDied: the child has ended and everything it wrote has been received.
        """
        if not self._frames and self.alive:
            await self._wait(timeout_s)
        if not self._frames and self.alive:
            await asyncio.sleep(LATE_S)
        if self._frames:
            return self._frames.popleft()
        if not self.alive:
            await self.reap()
            raise ProcessDied(self._how_it_ended())
        return None

    async def _wait(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(max(timeout_s, 0.0), self._wake)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def kill(self) -> None:
        """SIGKILL to the child and everything in its group, at once; the pipes are closed."""
        self._kill_group()
        if self._writer is not None and not self._writer.is_closing():
            self._writer.abort()  # unlike close, without waiting for the child to read what is queued
        self._close_pipes()
        if not self.gone.done():
            self.gone.set_result(None)
        self._wake()

    async def reap(self) -> bool:
        """Waits, at most REAP_S, until the process is gone and its pipes are closed; False if it is not.

        A child that closed its pipe is of no use, alive or not, and what it started must not outlive it: both are
        killed first.
        """
        deadline = time.monotonic() + REAP_S
        pause = 0.0
        self._kill_group()
        await asyncio.sleep(0)  # transports close their files in the loop's next turn
        while self.popen.poll() is None:
            if time.monotonic() > deadline:
                log.error("grading process %d was killed %.0f s ago and is still there", self.pid, REAP_S)
                return False
            await asyncio.sleep(pause)
            pause = min(pause * 2 + 0.001, 0.05)
        self._close_pipes()
        return True

    def _close_pipes(self) -> None:
        """A transport owns its pipe's file once it exists; before that the file is ours."""
        for transport, pipe in ((self._reader, self.popen.stdout), (self._writer, self.popen.stdin)):
            if transport is not None:
                transport.close()
            elif pipe is not None:
                pipe.close()

    def _kill_group(self) -> None:
        if self.popen.returncode is None:  # until it is reaped its id cannot belong to anyone else
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def _how_it_ended(self) -> str:
        status = self.popen.returncode
        if status == EXIT_MEMORY:
            return "out of memory"
        if status is not None and status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"


def _environment() -> dict[str, str]:
    """One thread each; finds whatever its parent can import, and modules of the working directory last."""
    paths = [path for path in sys.path if path]
    cwd = os.getcwd()
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    search = os.pathsep.join(dict.fromkeys([*paths, cwd]))
    return {**os.environ, **dict.fromkeys(threads, "1"), "PYTHONPATH": search}
