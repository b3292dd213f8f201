"""Writes what is made from the chart: its README's table of values, the schema of the service's settings, and the plain
manifests of deploy/kuberay/. `make chart`; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import yaml

from sapo_ray.control.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "sapo-ray"
README, SCHEMA = CHART / "README.md", CHART / "values.schema.json"
MANIFESTS, EXAMPLES = ROOT / "deploy" / "kuberay", ROOT / "deploy" / "values"
BEGIN, END = (
    "<!-- values: written by `make chart` from values.schema.json and values.yaml -->",
    "<!-- end of values -->",
)
NAME = "sapo-ray"
"""Release and namespace of the plain manifests."""
OF_THE_CHART = frozenset(
    {
        *("data_dir", "database_url", "secrets_dir", "admin_key", "host", "port", "control_url"),
        *("ray_jobs_url", "ray_auth_token", "metrics_port", "metrics_host"),
        *("shared_cluster", "cluster_template", "cluster_network_policy"),
        *("kube_url", "kube_account_dir", "kube_namespace", "kube_owner"),
    }
)
"""Settings that the chart's own values decide."""
HEAD = """\
# {name}: made from the chart with deploy/values/{name}.yaml by `make chart`; edit there.
# kubectl create namespace {release}
{secrets}# kubectl -n {release} apply -f deploy/kuberay/{name}.yaml
"""
AGAIN = """\
# Applied again after a change, it takes back what Ray's autoscaler decided; the chart (ray.mode: managed) does not.
"""


def settings_schema() -> dict[str, Any]:
    """What control.settings may hold, from the settings themselves."""
    found = {}
    for name, said in Settings.model_json_schema()["properties"].items():
        if name not in OF_THE_CHART:
            kind = {"type": "array", "items": {"type": "string"}} if said.get("type") == "array" else said
            found[name] = {**kind, "description": said["description"]}
            found[name].pop("default", None)
            found[name].pop("title", None)
    return found


def schema() -> dict[str, Any]:
    """values.schema.json with today's settings."""
    found: dict[str, Any] = json.loads(SCHEMA.read_text())
    found["properties"]["control"]["properties"]["settings"]["properties"] = settings_schema()
    return found


def readme() -> str:
    """README.md with today's table."""
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    rows = "\n".join(f"| `{key}` | {_cell(default)} | {meaning} |" for key, default, meaning in _rows(schema(), values))
    return f"{before}{BEGIN}\n\n| value | default | meaning |\n|---|---|---|\n{rows}\n\n{END}{after}"


def _rows(whole: dict[str, Any], values: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    def walk(key: str, said: dict[str, Any], value: Any) -> Iterator[tuple[str, Any, str]]:
        inner = said.get("properties")
        for part in said.get("allOf", []):
            inner = whole["definitions"][part["$ref"].rsplit("/", 1)[1]]["properties"]
        if inner is None or key.endswith((".settings", ".resources", ".affinity")):
            yield key, value, said["description"]
        else:
            for name, part in inner.items():
                default = value[name] if isinstance(value, dict) and name in value else ""
                yield from walk(f"{key}.{name}", part, default)

    for name, part in whole["properties"].items():
        if name != "global":
            yield from walk(name, part, values[name])


def _cell(value: Any) -> str:
    if isinstance(value, dict) and set(value) >= {"rollout", "learner", "verifier"}:
        return "three groups"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if text else "none"


def manifest(name: str) -> str:
    """The plain objects of an example, without those of `helm test`."""
    text = (EXAMPLES / f"{name}.yaml").read_text()
    secrets = "".join(line + "\n" for line in text.splitlines() if line.startswith("#") and "create secret" in line)
    values = yaml.safe_load(text)
    values["ray"].setdefault("mode", "static")
    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(values, name=NAME, namespace=NAME)
    objects = []
    for template, text in sorted(texts.items()):
        if template.endswith(".yaml") and "/tests/" not in template:
            objects += [one for one in yaml.safe_load_all(text) if one]
    for one in objects:
        for labels in (one["metadata"]["labels"], _pod_labels(one)):
            labels.pop("helm.sh/chart", None)
            if "app.kubernetes.io/managed-by" in labels:
                labels["app.kubernetes.io/managed-by"] = "kubectl"
        one["metadata"].get("annotations", {}).pop("helm.sh/resource-policy", None)
        if one["metadata"].get("annotations") == {}:
            del one["metadata"]["annotations"]
    objects = [one for one in objects if not one["metadata"]["name"].endswith("-test")]
    dumped = yaml.safe_dump_all(objects, sort_keys=False, width=120)
    again = AGAIN if any(one["kind"] == "RayCluster" for one in objects) else ""
    return HEAD.format(name=name, release=NAME, secrets=secrets) + again + "---\n" + dumped


def _pod_labels(thing: dict[str, Any]) -> dict[str, str]:
    if thing["kind"] != "Deployment":
        return {}
    labels: dict[str, str] = thing["spec"]["template"]["metadata"]["labels"]
    return labels


def pages() -> dict[Path, str]:
    """Every file that is made, with what it must hold."""
    made = {SCHEMA: json.dumps(schema(), indent=2) + "\n", README: readme()}
    return made | {MANIFESTS / path.name: manifest(path.stem) for path in sorted(EXAMPLES.glob("*.yaml"))}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
