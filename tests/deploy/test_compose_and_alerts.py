"""What lies in deploy/ for one machine, and for Prometheus, fits the service as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sapo_ray.control.launcher import RayJobs
from sapo_ray.control.serve import _metrics
from sapo_ray.control.settings import Settings, load_settings
from sapo_ray.control.store import Store

ROOT = Path(__file__).parents[2]
SECRETS = {"POSTGRES_PASSWORD": "p" * 48, "SAPO_ADMIN_KEY": "a" * 48, "RAY_AUTH_TOKEN": "b" * 64}


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / name).read_text())
    return found


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_composes_own_reader_accepts_the_files(files: list[str]) -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("there is no docker-compose: its own reader is not asked")
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


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the series and families of a service that runs."""
    from sapo_ray.control.app import create_app

    settings = load_settings(data_dir=tmp_path_factory.mktemp("metrics"))
    store = Store(settings.database_url)
    store.migrate()
    with RayJobs("http://127.0.0.1:1") as launcher:
        app = create_app(settings, store, launcher)
        _metrics(app)
        told = generate_latest(app.state.control.telemetry.registry).decode()
    store.close()
    families = list(text_string_to_metric_families(told))
    names = {one.name for one in families} | {sample.name for one in families for sample in one.samples}
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    return names | {one.name + end for one in families for end in suffixes.get(one.type, ())}


def test_every_alert_asks_for_metrics_that_the_service_has(metrics: set[str]) -> None:
    assert len(rules()) == len({one["alert"] for one in rules()}) == 12
    for one in rules():
        asked = set(re.findall(r"sapo_\w+", one["expr"]))
        assert asked, one["alert"]
        assert asked <= metrics, f"{one['alert']} asks for {asked - metrics}"
        assert one["expr"].count("(") == one["expr"].count(")")
        assert one["labels"]["severity"] in ("critical", "warning")


def test_every_alert_has_its_place_in_the_runbook_and_the_runbook_has_no_others() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert re.findall(r"^### (SapoRay\w+)$", text, re.M) == [one["alert"] for one in rules()]


def test_outcomes_and_kinds_that_alerts_name_are_those_that_are_counted() -> None:
    counted = (ROOT / "sapo_ray" / "control" / "routes" / "link.py").read_text()
    for outcome in ("refused", "unauthenticated"):
        assert f'labels("{outcome}")' in counted
    from sapo_ray.control.store import SequenceGap

    assert SequenceGap.__name__.lower() == "sequencegap"
