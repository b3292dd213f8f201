"""Schemas of Kubernetes (strict: unknown fields are errors), KubeRay's where they are at hand, and those of the
Prometheus operator."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jsonschema.protocols import Validator
from referencing import Registry, Resource

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="no kubernetes-validate: objects are validated with the CPU set only"
)

OLDEST, NEWEST = "1.28", "1.37"
"""Versions of Kubernetes: what the chart asks for, and the newest whose schemas are at hand."""
CRDS = Path(__file__).resolve().parents[3] / "shared" / "crds"
"""KubeRay's CustomResourceDefinitions, which may lie beside the checkout."""
SERVICE_MONITOR = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["selector", "endpoints"],
            "properties": {
                "selector": {"type": "object", "required": ["matchLabels"]},
                "endpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string"},
                            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                        },
                    },
                },
            },
        },
    },
}
"""The part of it that the chart uses."""
PROMETHEUS_RULE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PrometheusRule"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["groups"],
            "properties": {
                "groups": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "rules"],
                        "properties": {
                            "name": {"type": "string"},
                            "rules": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "required": ["alert", "expr"],
                                    "properties": {
                                        "alert": {"type": "string"},
                                        "expr": {"type": "string"},
                                        "for": {"type": "string", "pattern": "^[0-9]+[smh]$"},
                                        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                                        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
                                    },
                                },
                            },
                        },
                    },
                }
            },
        },
    },
}
"""Likewise."""


def problems(thing: dict[str, Any], version: str = NEWEST) -> list[str]:
    """What is wrong with an object, or with a pod template (kind Pod). A kind without schema is an error."""
    found = _validator(thing["apiVersion"], thing["kind"], version).iter_errors(thing)
    name = f"{thing['kind']} {thing.get('metadata', {}).get('name')}"
    return [f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


def has_crds() -> bool:
    """Whether KubeRay's schemas are at hand."""
    return any(CRDS.glob("*.yaml"))


@cache
def _validator(api: str, kind: str, version: str) -> Validator:
    if kind == "ServiceMonitor":
        return jsonschema.Draft202012Validator(SERVICE_MONITOR)
    if kind == "PrometheusRule":
        return jsonschema.Draft202012Validator(PROMETHEUS_RULE)
    if api.startswith("ray.io/"):
        return jsonschema.Draft202012Validator(_crds()[api, kind])
    schema, registry = _kubernetes(api, kind, version)
    return jsonschema.Draft202012Validator(schema, registry=registry)


def _kubernetes(api: str, kind: str, version: str) -> tuple[dict[str, Any], Registry[Any]]:
    folder = _folder(version)
    group, _, number = api.rpartition("/")
    file = folder / f"{kind.lower()}-{group.split('.')[0] + '-' if group else ''}{number}.json"
    if not file.is_file():
        raise LookupError(f"no schema of {api} {kind} in Kubernetes {version}")
    schema = json.loads(file.read_text())
    return schema, Resource.from_contents(schema) @ _definitions(version)


@cache
def _definitions(version: str) -> Registry[Any]:
    definitions = json.loads((_folder(version) / "_definitions.json").read_text())
    return Resource.from_contents(definitions) @ Registry()


def _folder(version: str) -> Path:
    schemas = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    found = list(schemas.glob(f"v{version}.*-local-strict"))
    assert len(found) == 1, f"schemas of Kubernetes {version}: {found}"
    return found[0]


@cache
def _crds() -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for path in sorted(CRDS.glob("*.yaml")):
        for crd in yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            for version in crd["spec"]["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]] = schema
    return found


def _strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema, in which a field that is not named is an error."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", None):
        schema.pop("type", None)
        return schema | {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema:
        schema["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for key in ("additionalProperties", "items"):
        schema[key] = _strict(schema[key]) if key in schema else None
        if schema[key] is None:
            del schema[key]
    if schema.pop("nullable", None) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    return schema
