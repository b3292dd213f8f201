"""What is made from the chart is up to date, and what the chart says of the service is so."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import crd_schemas
import kube_schemas
import pytest
import yaml
from chart_rendering import CHART, EXAMPLES, MANIFESTS, ROOT, Object, one, pod_templates, ray_cluster, render

from sapo_ray import __version__
from sapo_ray.control.serve import _metrics
from sapo_ray.control.settings import Settings


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_pages", ROOT / "scripts" / "chart_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_made_files_are_as_make_chart_writes_them(maker: ModuleType) -> None:
    made: dict[Path, str] = maker.pages()
    assert {path.name for path in made if path.parent == MANIFESTS} == {path.name for path in MANIFESTS.iterdir()}
    for path, text in made.items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is not what `make chart` writes"


@pytest.mark.parametrize("name", EXAMPLES)
def test_plain_manifests_hold_valid_objects_of_their_own_release(name: str) -> None:
    objects: list[Object] = list(yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text()))
    assert ray_cluster(objects)
    things = objects + [{"apiVersion": "v1", "kind": "Pod", **pod} for _, pod in pod_templates(objects)]
    skipped = () if crd_schemas.has_crds() else ("RayCluster",)
    found = [problem for thing in things if thing["kind"] not in skipped for problem in kube_schemas.problems(thing)]
    assert not found, "\n".join(found)
    assert {thing["metadata"]["namespace"] for thing in objects} == {"sapo-ray"}
    assert not any("helm.sh" in json.dumps(thing) for thing in objects)


def needed_secrets(thing: object, release: str) -> set[tuple[str, str]]:
    """Name and key of each Secret that objects name, but for those that operator or service make for a cluster."""
    if isinstance(thing, list):
        return set().union(*(needed_secrets(one, release) for one in thing))
    if not isinstance(thing, dict):
        return set()
    found = set().union(*(needed_secrets(one, release) for one in thing.values()))
    if said := thing.get("secretKeyRef"):
        found.add((said["name"], said["key"]))
    if thing.get("mode") == "token" and "secretName" in thing:
        found.add((thing["secretName"], "auth_token"))
    return {(name, key) for name, key in found if name != f"{release}-cluster" and not name.startswith("sapo-job-")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_commands_beside_an_example_make_the_secrets_that_it_names_in_its_namespace(name: str) -> None:
    objects = render(yaml.safe_load(EXAMPLES[name].read_text()), "sapo-ray", "sapo-ray")
    needed = needed_secrets([*objects, ray_cluster(objects)], "sapo-ray")
    places = [EXAMPLES[name], MANIFESTS / f"{name}.yaml"]
    places += [ROOT / "docs" / "kubernetes.md"] if name == "cluster-per-job" else []
    for place in places:
        text = place.read_text()
        made = re.findall(r"kubectl -n sapo-ray create secret generic (\S+) --from-literal=([^=\s]+)=", text)
        assert set(made) == needed, place
        assert text.count("create secret") == len(made), place
        assert not made or "kubectl create namespace sapo-ray\n" in text, place


def test_the_page_names_what_stays_when_the_chart_is_uninstalled() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.split("## Uninstall from Kubernetes")[1].split("\n## ")[0]
    objects = [thing for thing in render({}, "sapo-ray", "sapo-ray") if "annotations" in thing["metadata"]]
    kept = [one for one in objects if one["metadata"]["annotations"].get("helm.sh/resource-policy") == "keep"]
    assert {one["metadata"]["name"] for one in kept} == {"sapo-ray-data", "sapo-ray-database"}
    assert all(f"`{one['metadata']['name']}`" in section for one in kept)
    assert "delete raycluster sapo-ray-cluster --wait" in section


def test_every_setting_of_the_service_is_the_charts_or_may_be_set(maker: ModuleType) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    settable = set(schema["properties"]["control"]["properties"]["settings"]["properties"])
    assert settable | maker.OF_THE_CHART == set(Settings.model_fields)
    assert not settable & maker.OF_THE_CHART


def test_every_value_has_a_default_and_a_description() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def walk(key: str, said: Object, value: object) -> None:
        assert said.get("description") or key in ("", "ray.groups"), key
        if "properties" in said and "affinity" not in key and "settings" not in key and "resources" not in key:
            assert said["additionalProperties"] is False, key
            assert isinstance(value, dict), key
            assert set(said["properties"]) - {"global"} == set(value), key
            for name in value:
                walk(f"{key}.{name}".strip("."), said["properties"][name], value[name])

    walk("", schema | {"description": "all"}, values)
    defaults = schema["definitions"]["group"]["properties"]
    assert set(defaults) - set(values["ray"]["groupDefaults"]) == {"role"}


def test_the_chart_is_for_this_version_of_the_service_and_the_locked_ray() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    locks = [(ROOT / "requirements" / f"{name}.lock").read_text() for name in ("cpu", "gpu")]
    assert all(f"\nray=={values['ray']['version']}\n" in lock for lock in locks)


def test_the_dashboard_shows_metrics_that_the_service_has(tmp_path: Path) -> None:
    from prometheus_client import generate_latest

    from sapo_ray.control.app import create_app
    from sapo_ray.control.launcher import RayJobs
    from sapo_ray.control.store import Store

    settings = Settings(data_dir=tmp_path)
    store = Store(settings.database_url)
    store.migrate()
    with RayJobs("http://127.0.0.1:9") as launcher:
        app = create_app(settings, store, launcher)
        _metrics(app)
        shown = generate_latest(app.state.control.telemetry.registry).decode()
    store.close()
    families = dict(re.findall(r"(?m)^# TYPE (\S+) (\w+)$", shown))
    existing = set(families)
    for name, kind in families.items():
        if kind == "histogram":
            existing |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    config = one(render({"monitoring": {"dashboard": {"enabled": True}}}), "ConfigMap", "-dashboard")
    dashboard = json.loads(config["data"]["sapo-ray.json"])
    used = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            used |= set(re.findall(r"\bsapo_\w+", target["expr"]))
    assert used <= existing, sorted(used - existing)
    own = {name for name in existing if name.startswith("sapo_") and not name.endswith(("_created", "_sum"))}
    assert {name.removesuffix("_bucket").removesuffix("_count") for name in own} == {
        name.removesuffix("_bucket").removesuffix("_count") for name in used
    }
