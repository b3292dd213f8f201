"""`sapo-ray migrate`: the tables of this version, before a service starts."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sapo_ray.cli.main import app


def test_it_makes_the_tables_once_and_a_newer_database_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_DATA_DIR", str(tmp_path / "data"))
    for _ in range(2):
        done = CliRunner().invoke(app, ["migrate"])
        assert (done.exit_code, done.output) == (0, "the database has this version's tables\n")
    with closing(sqlite3.connect(tmp_path / "data" / "control.db")) as database, database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert {"jobs", "alembic_version"} <= tables
        database.execute("UPDATE alembic_version SET version_num = 'later'")
    done = CliRunner().invoke(app, ["migrate"])
    assert done.exit_code == 1
    assert "is at version later, which this sapo-ray does not know" in done.output


def test_a_database_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAPO_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SAPO_DATABASE_URL", "postgresql+psycopg://u@127.0.0.1:9/d")
    assert CliRunner().invoke(app, ["migrate"]).exit_code == 1
