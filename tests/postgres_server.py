"""A PostgreSQL server of a test session's own: a temporary directory, a Unix socket, one process that we started."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

START_S = 60


class NoServer(Exception):
    """PostgreSQL is not installed: tests that need it are skipped."""


class BrokenServer(Exception):
    """PostgreSQL is installed and does not run: tests that need it fail, or nobody would know that they did not run."""


@contextmanager
def running() -> Iterator[PostgresServer]:
    """One that has begun, and is removed at the end. Skips the test where there is none."""
    try:
        server = PostgresServer()
    except NoServer as error:
        pytest.skip(f"no PostgreSQL: {error}")
    try:
        server.start()
        yield server
    finally:
        server.remove()


class PostgresServer:
    """`start()` and `stop()` may be repeated; the data stay until `remove()`."""

    def __init__(self) -> None:
        self._initdb, self._postgres = _program("initdb"), _program("postgres")
        self._user = _unprivileged_user()
        # Paths of sockets are limited to about 100 characters, so not under pytest's long temporary path.
        self.folder = Path(tempfile.mkdtemp(prefix="sapo-pg-"))
        if self._user is not None:
            os.chown(self.folder, pwd.getpwnam(self._user).pw_uid, pwd.getpwnam(self._user).pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        command = [self._initdb, "-D", self._data, "-U", "sapo", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        done = subprocess.run(command, capture_output=True, user=self._user, cwd=self.folder, timeout=120, check=False)
        if done.returncode != 0:
            self.remove()
            raise BrokenServer(f"initdb failed: {done.stderr.decode()[-500:]}")

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    @property
    def pid(self) -> int:
        """Of the server's first process."""
        assert self._process is not None
        return self._process.pid

    def url(self, database: str) -> str:
        """For the store."""
        return f"postgresql://sapo@/{database}?host={self.folder}&port=5432"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """A connection of one's own, outside of any transaction."""
        return psycopg.connect(
            host=str(self.folder), port=5432, user="sapo", dbname=database, autocommit=True, connect_timeout=5
        )

    def execute(self, statement: str) -> None:
        """Run one statement in the `postgres` database."""
        with self.connect() as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._postgres, "-D", self._data, "-k", str(self.folder), "-p", "5432", "-F"),
                    *("-c", "listen_addresses=", "-c", "max_connections=200", "-c", "deadlock_timeout=200ms"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self.folder / "log").read_text()[-500:]
                    raise BrokenServer(f"postgres did not start: {error}; {said}") from error
            time.sleep(0.05)

    def stop(self) -> None:
        """End it at once: open connections are cut (`immediate` shutdown, as when the machine goes)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=START_S)
            self._process = None

    def remove(self) -> None:
        """Stop it and delete everything."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _program(name: str) -> str:
    """PostgreSQL's programs are on the PATH, or where Debian keeps them."""
    found = shutil.which(name) or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))), None)
    if found is None:
        raise NoServer(f"{name} is not installed")
    return found


def _unprivileged_user() -> str | None:
    """Whom to run it as: the server refuses root. None: ourselves."""
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError as error:
        raise BrokenServer("we are root, PostgreSQL refuses root, and there is no user `postgres`") from error
