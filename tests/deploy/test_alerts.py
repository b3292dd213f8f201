"""Alerts: each asks for what the service tells, fires for what it is for and for nothing else, and has its runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from sapo_ray.control.app import create_app
from sapo_ray.control.launcher import RayJobs
from sapo_ray.control.reconciler.loop import _KINDS
from sapo_ray.control.serve import _metrics
from sapo_ray.control.settings import load_settings
from sapo_ray.control.store import SequenceGap, Store

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "helm" / "sapo-ray" / "alerts.yaml"
DASHBOARD = ROOT / "helm" / "sapo-ray" / "dashboards" / "service.json"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def asked_by_the_dashboard() -> list[str]:
    """The expressions of its panels, with the variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [one.replace("$__rate_interval", "5m").replace("$__range", "1h") for one in found]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Metric]:
    """What a service that runs tells."""
    settings = load_settings(data_dir=tmp_path_factory.mktemp("metrics"))
    store = Store(settings.database_url)
    store.migrate()
    with RayJobs("http://127.0.0.1:1") as launcher:
        app = create_app(settings, store, launcher)
        _metrics(app)
        told = generate_latest(app.state.control.telemetry.registry).decode()
    store.close()
    return list(text_string_to_metric_families(told))


def names(families: list[Metric]) -> set[str]:
    """Of families and of their series."""
    told = {one.name for one in families} | {sample.name for one in families for sample in one.samples}
    return told | {one.name + end for one in families for end in SUFFIXES.get(one.type, ())}


def test_every_alert_asks_for_metrics_that_the_service_has(families: list[Metric]) -> None:
    assert len(rules()) == len({one["alert"] for one in rules()}) == 14
    for one in rules():
        asked = set(re.findall(r"sapo_\w+", one["expr"]))
        assert asked, one["alert"]
        assert asked <= names(families), f"{one['alert']} asks for {asked - names(families)}"
        assert one["labels"]["severity"] in ("critical", "warning")


def test_expressions_of_alerts_and_dashboard_are_prometheuss() -> None:
    parser = pytest.importorskip(
        "promql_parser", reason="no promql-parser: expressions are parsed with the CPU set only"
    )
    expressions = [one["expr"] for one in rules()] + asked_by_the_dashboard()
    assert len(expressions) > 20
    for one in expressions:
        parser.parse(one)  # raises ValueError
    with pytest.raises(ValueError, match="unclosed"):
        parser.parse("sum(rate(sapo_store_up[5m])")


def test_alerts_fire_for_what_they_are_for_and_leave_the_rest_alone() -> None:
    """By Prometheus's own evaluation, over series of hours; the cases name every alert."""
    cases = Path(__file__).with_name("alerts_cases.yaml")
    fired = {
        check["alertname"]
        for one in yaml.safe_load(cases.read_text())["tests"]
        for check in one["alert_rule_test"]
        if check["exp_alerts"]
    }
    assert fired == {one["alert"] for one in rules()}
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool: no alert was evaluated (Debian: apt-get install prometheus)")
    done = subprocess.run([promtool, "test", "rules", cases], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_place_in_the_runbook_and_the_runbook_has_no_others() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert re.findall(r"^### (SapoRay\w+)$", text, re.M) == [one["alert"] for one in rules()]


def test_what_the_service_tells_is_what_the_page_of_metrics_says(families: list[Metric]) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text().split("## Of the service")[1].split("\n## ")[0]
    said = re.findall(r"`(sapo_\w+)`", text)
    told = {one.name + ("_total" if one.type == "counter" else "") for one in families}
    told = {name for name in told if name.startswith("sapo_") and not name.endswith("_created")}
    assert len(said) == len(set(said))
    assert set(said) == told


def test_outcomes_and_kinds_that_alerts_name_are_those_that_are_counted() -> None:
    counted = (ROOT / "sapo_ray" / "control" / "routes" / "link.py").read_text()
    for outcome in ("refused", "unauthenticated"):
        assert f'labels("{outcome}")' in counted
    kinds = {
        kind for one in rules() for said in re.findall(r'kind!?[=~]+"([^"]+)"', one["expr"]) for kind in said.split("|")
    }
    assert kinds == {"launcher", "cluster"} <= {name for _, name in _KINDS}
    assert SequenceGap.__name__.lower() == "sequencegap"
