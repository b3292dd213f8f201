"""Schemas of Kubernetes (strict: unknown fields are errors), KubeRay's where they are at hand, and those of the
Prometheus operator."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import crd_schemas
import jsonschema
import pytest
from jsonschema.protocols import Validator
from referencing import Registry, Resource

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="no kubernetes-validate: objects are validated with the CPU set only"
)

OLDEST, NEWEST = "1.28", "1.37"
"""Versions of Kubernetes: what the chart asks for, and the newest whose schemas are at hand."""
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


@cache
def _validator(api: str, kind: str, version: str) -> Validator:
    if kind == "ServiceMonitor":
        return jsonschema.Draft202012Validator(SERVICE_MONITOR)
    if kind == "PrometheusRule":
        return jsonschema.Draft202012Validator(PROMETHEUS_RULE)
    if api.startswith("ray.io/"):
        return crd_schemas.validator(api, kind)
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
