"""schemathesis over the OpenAPI document, against a server process: it finds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from api_parts import brought_to, run_dir
from api_server import ADMIN_KEY, ServerProcess

from sapo_ray.control.store import Store

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parent / "schemathesis.toml"


def schemathesis(url: str, config: Path, *arguments: str) -> None:
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json",
        "--header", f"Authorization: Bearer {ADMIN_KEY}", "--continue-on-failure", "--no-color",
        "--suppress-health-check", "all", "--phases", "examples,coverage,fuzzing", "--seed", "1", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=config.parent)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


@pytest.mark.slow
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, f"sqlite:///{tmp_path / 'control.db'}") as server:
        config = tmp_path / "schemathesis.toml"
        config.write_text(CONFIG.read_text())
        schemathesis(server.url, config, "--max-examples", "20")
        assert '"unhandled"' not in server.log


@pytest.mark.slow
def test_schemathesis_finds_nothing_about_a_job_that_has_everything(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'control.db'}"
    with ServerProcess(tmp_path, url) as server:
        store = Store(url)
        import httpx

        made = httpx.post(
            f"{server.url}/v1/jobs",
            json={"spec": {"preset": "quickstart"}},
            headers={"Authorization": f"Bearer {ADMIN_KEY}"},
            trust_env=False,
        )
        job_id = made.json()["id"]
        folder = run_dir(store, job_id)
        (folder / "export").mkdir()
        (folder / "export" / "config.json").write_text("{}")
        (folder / "logs").mkdir()
        (folder / "logs" / "rollout-0.log").write_text("ready\n")
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' * 5)
        (folder / "samples.jsonl").write_text('{"step": 1, "completion": "x"}\n' * 5)
        brought_to(store, job_id, "succeeded")
        store.close()
        config = tmp_path / "schemathesis.toml"
        config.write_text(f'parameters."path.job_id" = "{job_id}"\n\n{CONFIG.read_text()}')
        schemathesis(
            server.url, config, "--max-examples", "20", "--include-method", "GET", "--include-path-regex", "job_id"
        )
        assert '"unhandled"' not in server.log
