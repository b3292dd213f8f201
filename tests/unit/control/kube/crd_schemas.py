"""KubeRay's own schema of a RayCluster, where its CRDs lie beside the repository; validation is skipped where not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRD = Path(__file__).parents[5] / "shared" / "crds" / "ray.io_rayclusters.yaml"


@cache
def validator() -> Any:
    """Refuses unknown keys too, which a real server would drop in silence. None if the CRD is not there."""
    if not CRD.is_file():
        return None
    crd = yaml.load(CRD.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(one for one in crd["spec"]["versions"] if one["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def problems(body: dict[str, Any]) -> list[str]:
    """What the schema holds against an object."""
    known = validator()
    found = known.iter_errors(body) if known is not None else ()
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]


def _strict(schema: Any) -> Any:
    """OpenAPI v3 as Kubernetes writes it, as a JSON schema without unknown properties."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", None):
        schema.pop("type", None)
        return schema | {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema:
        schema["properties"] = {name: _strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
    for key in ("additionalProperties", "items"):
        if key in schema:
            schema[key] = _strict(schema[key])
    if schema.pop("nullable", None) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    return schema
