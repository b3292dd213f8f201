"""That the tests on PostgreSQL cannot stay away unnoticed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import postgres_server
import pytest
from postgres_server import BrokenServer, NoServer, PostgresServer


def test_a_server_that_is_installed_and_does_not_start_is_a_failure_and_no_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("initdb", "postgres"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(postgres_server, "_unprivileged_user", lambda: None)
    assert shutil.which("initdb") == str(tmp_path / "initdb")
    with pytest.raises(BrokenServer, match="initdb failed"):
        PostgresServer()


def test_a_server_that_is_not_installed_is_a_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoServer, match="no-such-program is not installed"):
        postgres_server._program("no-such-program")
