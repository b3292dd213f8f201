"""KubeRay's own schemas, where its CRDs lie beside the checkout; nothing is validated by them where they do not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRDS = Path(__file__).resolve().parents[3] / "shared" / "crds"


def has_crds() -> bool:
    """Whether they are at hand."""
    return any(CRDS.glob("*.yaml"))


def problems(body: dict[str, Any]) -> list[str]:
    """What its schema holds against an object of KubeRay's; nothing without CRDs."""
    if not has_crds():
        return []
    found = validator(body["apiVersion"], body["kind"]).iter_errors(body)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


@cache
def validator(api: str, kind: str) -> jsonschema.Draft202012Validator:
    """Refuses unknown keys too, which a real server would drop in silence. Raises KeyError for a kind without CRD."""
    return jsonschema.Draft202012Validator(_schemas()[api, kind])


@cache
def _schemas() -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for path in sorted(CRDS.glob("*.yaml")):
        for crd in yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            for version in crd["spec"]["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]] = schema
    return found


def _strict(schema: Any) -> Any:
    """OpenAPI v3 as Kubernetes writes it, as a JSON schema in which a field that is not named is an error."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", None):
        schema.pop("type", None)
        return schema | {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema:
        schema["properties"] = {name: _strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for key in ("additionalProperties", "items"):
        if key in schema:
            schema[key] = _strict(schema[key])
    if schema.pop("nullable", None) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    return schema
