"""Backup and restore by the very commands of docs/operations.md: what was there then is there again, and goes on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from api_parts import deliver, problem, run_dir, started, submitted
from api_server import FakeCluster
from starlette.testclient import TestClient

from sapo_ray.control.app import create_app
from sapo_ray.control.settings import Settings, load_settings
from sapo_ray.control.store import Store, keys

STEP = {"kind": "step", "step": 1, "steps": 60, "drops": {}, "metrics": {"reward/mean": 0.5}}
PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def commands() -> dict[str, str]:
    """The page's shell blocks by what their first line says that they are for."""
    blocks = re.findall(r"^```bash\n# ([^\n:]+):[^\n]*\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == len(dict(blocks))
    return dict(blocks)


def run(what: str, settings: Settings, backup: Path) -> None:
    """One block, as an operator does."""
    url = settings.database_url.replace("+psycopg", "")
    given = {
        "SAPO_DATA_DIR": str(settings.data_dir),
        "BACKUP": str(backup),
        "DATABASE": url,
        "MAINTENANCE": re.sub(r"@([^/]*)/\w+", r"@\1/postgres", url),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    script = "set -euo pipefail\n" + commands()[what]
    done = subprocess.run(["bash", "-c", script], env=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{what}: {done.stdout}{done.stderr}"


@contextmanager
def service(settings: Settings, secret: str) -> Iterator[tuple[TestClient, Store]]:
    """One that runs on what is there now, and a client with that key; all connections are closed at its end."""
    store = Store(settings.database_url)
    try:
        store.migrate()
        with TestClient(create_app(settings, store, FakeCluster())) as client:  # type: ignore[arg-type]
            client.headers["Authorization"] = f"Bearer {secret}"
            yield client, store
    finally:
        store.close()


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_what_was_backed_up_while_the_service_ran_is_there_again_and_goes_on(
    backend: str, store_url: str, tmp_path: Path
) -> None:
    if backend == "postgresql" and shutil.which("pg_restore") is None:
        pytest.skip("no pg_dump and pg_restore on the PATH: backups of PostgreSQL were not tried")
    data, backup = tmp_path / "data", tmp_path / "backup"
    data.mkdir()
    backup.mkdir()
    if backend == "sqlite":
        store_url = f"sqlite:///{data / 'control.db'}"
    settings = load_settings(data_dir=data, database_url=store_url, rate_per_s=0)

    first = Store(store_url)
    first.migrate()
    with first.begin() as session:
        _, secret = keys.create_key(session, "acme", "a test", ["read", "submit"])
    first.close()
    with service(settings, secret) as (acme, store):
        job_id = submitted(acme)
        token = started(store, job_id)
        deliver(acme, job_id, token, 1, {"kind": "transition", "state": "running"}, STEP)
        (run_dir(store, job_id) / "journal.jsonl").write_text("a line\n")
        rows = b'{"question": "1+1", "answer": "2"}\n'
        dataset = acme.post("/v1/datasets?name=r.jsonl", content=rows, headers={"Content-Type": "application/jsonl"})
        assert dataset.status_code == 201, dataset.text
        before = acme.get(f"/v1/jobs/{job_id}").json()
        events = acme.get(f"/v1/jobs/{job_id}/events").json()["data"]
        run("backup of PostgreSQL" if backend == "postgresql" else "backup of SQLite", settings, backup)
        run("backup of files", settings, backup)
        newer = submitted(acme)
        deliver(acme, job_id, token, 3, {"kind": "phase", "phase": "lost"})

    for folder in ("runs", "datasets"):
        shutil.rmtree(data / folder)
    if backend == "sqlite":
        (data / "control.db").write_bytes(b"damaged")
        (data / "control.db-wal").write_bytes(b"of another database" * 1000)
    run("restore of PostgreSQL" if backend == "postgresql" else "restore of SQLite", settings, backup)
    run("restore of files", settings, backup)

    with service(settings, secret) as (acme, store):
        assert acme.get(f"/v1/jobs/{job_id}").json() == before
        assert acme.get(f"/v1/jobs/{job_id}/events").json()["data"] == events
        assert acme.get(f"/v1/datasets/{dataset.json()['id']}").json()["rows"] == 1
        assert (run_dir(store, job_id) / "journal.jsonl").read_text() == "a line\n"
        problem(acme.get(f"/v1/jobs/{newer}"), 404, "not_found")
        # A driver of after the backup is told from where to send again.
        assert problem(deliver(acme, job_id, token, 4, STEP), 409, "sequence_gap")["expected"] == 3
        assert deliver(acme, job_id, token, 3, {"kind": "phase", "phase": "again"}, STEP).json()["next_seq"] == 5
        assert submitted(acme) not in (job_id, newer)
