"""The control plane needs no more than requirements/control.lock, and that holds all it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from importlib.metadata import distribution
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ENGINES = ("ray", "torch", "vllm", "deepspeed", "transformers", "numpy")
START_S = 60


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(one): version for one, version in found.items()}


def test_the_control_set_has_the_versions_that_the_other_sets_have() -> None:
    control = pins("control.lock")
    assert len(control) > 20
    for other in ("cpu.lock", "gpu.lock"):
        assert {name: pins(other).get(name) for name in control} == control
    assert not set(ENGINES) & set(control)


def test_the_control_set_is_what_the_script_makes_of_the_projects_dependencies() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "control_lock.py")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert (ROOT / "requirements" / "control.lock").read_text() == made


def test_the_engines_are_not_among_what_the_service_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not {Requirement(one).name for one in project["dependencies"]} & set(ENGINES)
    assert set(ENGINES) - {"vllm"} <= {Requirement(one).name for one in project["optional-dependencies"]["engines"]}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the packages of control.lock and no others: links to those that are installed here."""
    folder = tmp_path_factory.mktemp("control")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    for name in pins("control.lock"):
        found = distribution(name)
        tops = {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}
        assert tops
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(found.locate_file(top)))
    (packages / "sapo_ray").symlink_to(ROOT / "sapo_ray")
    return folder / "bin" / "python"


def environment(**more: str) -> dict[str, str]:
    kept = {name: one for name, one in os.environ.items() if not name.startswith(("SAPO_", "RAY_", "PYTHON"))}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1", "SAPO_ADMIN_KEY": "k" * 24} | more


def test_the_service_starts_and_takes_a_job_with_nothing_else_installed(python: Path, tmp_path: Path) -> None:
    looks = f"import importlib.util as u; print([n for n in {ENGINES!r} if u.find_spec(n)])"
    assert subprocess.check_output([python, "-c", looks], env=environment(), text=True).strip() == "[]"
    log = tmp_path / "log"
    arguments = ["serve", "--port", "0", "--ray-jobs-url", "http://127.0.0.1:1", "--data-dir", str(tmp_path / "data")]
    with log.open("wb") as output:
        service = subprocess.Popen(
            [python, "-m", "sapo_ray.cli", *arguments], env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = address(service, log)
        spec = {"preset": "quickstart", "name": "light"}
        job = ask(url + "/v1/jobs", {"spec": spec})
        assert job["status"]["state"] == "queued"
        assert ask(url + "/v1/datasets?name=two&format=parquet", parquet(tmp_path / "two.parquet"))["rows"] == 2
        assert ask(url + "/readyz")["checks"] == {"database": "ok", "disk": "ok", "cluster": "down"}
    finally:
        service.send_signal(signal.SIGTERM)
        code = service.wait(60)
    assert code == 0, log.read_text()


@pytest.mark.parametrize("command", ["--help", "doctor --help", "jobs --help", "submit --help", "serve --help"])
def test_the_command_line_needs_no_engine_to_start(python: Path, command: str) -> None:
    subprocess.run(
        [python, "-m", "sapo_ray.cli", *command.split()], env=environment(), timeout=60, check=True, capture_output=True
    )


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("train JOB", "ray"),
        ("gates", "torch"),
        ("grade ROWS ROWS.out", "math_verify"),
        ("validate JOB --inputs", "transformers"),
    ],
)
def test_a_command_that_needs_an_engine_says_so_and_where_there_is_one(
    python: Path, command: str, missing: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("preset: quickstart\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"completion": "5", "gold": "5"}\n')
    words = command.replace("JOB", str(job)).replace("ROWS", str(rows)).split()
    done = subprocess.run(
        [python, "-m", "sapo_ray.cli", *words],
        env=environment(),
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: this environment has no {missing}, which this command needs: run it where")


def test_the_doctor_says_where_engines_are_looked_at(python: Path, tmp_path: Path) -> None:
    command = [python, "-m", "sapo_ray.cli", "doctor", "--json", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, env=environment(), timeout=60, check=True, capture_output=True, text=True)
    told = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert {told[one]["status"] for one in ("shm", "gpu", "nccl")} == {"skipped"}
    assert "--cluster" in told["gpu"]["detail"]
    assert told["storage"]["status"] == "ok"


def parquet(path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"question": ["1+1", "1+2"], "answer": ["2", "3"]}), path)
    return path.read_bytes()


def address(service: subprocess.Popen[bytes], log: Path) -> str:
    """Where it listens, once it answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert service.poll() is None, log.read_text()
        said = [line.split()[2] for line in log.read_text().splitlines() if line.startswith("sapo-ray serves ")]
        if said:
            try:
                urllib.request.urlopen(said[0] + "/healthz", timeout=5).close()
            except OSError:
                pass
            else:
                return said[0]
        time.sleep(0.2)
    raise AssertionError(f"the service did not answer within {START_S} s: {log.read_text()}")


def ask(url: str, body: object = None) -> dict[str, object]:
    headers = {"Authorization": f"Bearer {'k' * 24}"}
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    if data is not None:
        headers["Content-Type"] = "application/vnd.apache.parquet" if isinstance(body, bytes) else "application/json"
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        found: dict[str, object] = json.load(answer)
        return found
