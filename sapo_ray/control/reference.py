"""Writes docs/api.md from the OpenAPI document: `python -m sapo_ray.control.reference > docs/api.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI

from sapo_ray.control.documents import REF, describe
from sapo_ray.control.routes import ROUTERS

_HEAD = """\
# The API

<!-- Written by `make docs` from the routes in sapo_ray/control; edit there. -->

{description}
The document itself is at `/openapi.json`. Every operation may also answer 429, 500 and 503. Jobs are described in
[jobs.md](jobs.md).
"""
_EVERYWHERE = ("429", "500", "503")


def openapi_document() -> dict[str, Any]:
    """The document of the service, without a service."""
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    return describe(app)


def render(document: Mapping[str, Any]) -> str:
    """The reference page of an OpenAPI document."""
    text = _HEAD.format(description=document["info"]["description"])
    for tag in document["tags"]:
        text += f"\n## {tag['name'].capitalize()}\n\n{tag['description']}\n"
        for method, path, operation in _operations(document, tag["name"]):
            text += _operation(document, method, path, operation)
    text += "\n## Shapes\n"
    for name, schema in document["components"]["schemas"].items():
        # The parts of a job have a page of their own.
        if not name.endswith("Spec") and name != "JobSpecInput":
            text += _shape(name, schema)
    return text


def _operations(document: Mapping[str, Any], tag: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if tag in operation["tags"]:
                yield method.upper(), path, operation


def _operation(document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> str:
    text = f"\n### {method} {path}\n\n**{operation['summary']}.** {_line(operation['description'])}\n"
    parameters = operation.get("parameters", [])
    if parameters:
        text += "\n| parameter | in | type | meaning |\n|---|---|---|---|\n"
        for one in parameters:
            kind = _kind(one["schema"]) + (", required" if one.get("required") else "")
            text += f"| `{one['name']}` | {one['in']} | {_cell(kind)} | {_cell(one['description'])} |\n"
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        text += f"\nBody `{media}`: {_kind(content['schema'])}.\n"
        for example in list(content.get("examples", {}).values())[:1]:
            text += f"\n```json\n{json.dumps(example['value'], indent=2)}\n```\n"
    text += "\n| answer | |\n|---|---|\n"
    for status, answer in operation["responses"].items():
        if status not in _EVERYWHERE:
            bodies = [_kind(content.get("schema", {})) for content in answer.get("content", {}).values()]
            shown = "" if bodies in ([], ["[Problem](#problem)"]) else f" ({' or '.join(dict.fromkeys(bodies))})"
            text += f"| {status} | {_cell(answer['description'])}{shown} |\n"
    return text


def _shape(name: str, schema: Mapping[str, Any]) -> str:
    text = f"\n### {name}\n\n{_line(schema.get('description', ''))}\n"
    properties = schema.get("properties", {})
    if properties:
        text += "\n| field | type | meaning |\n|---|---|---|\n"
        required = schema.get("required", [])
        for field, one in properties.items():
            kind = _kind(one) + ("" if field in required else ", optional")
            text += f"| `{field}` | {_cell(kind)} | {_cell(one.get('description', ''))} |\n"
    return text


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(REF)
        return f"[{name}]({'jobs.md' if name.startswith('JobSpec') else '#' + name.lower()})"
    if "allOf" in schema:
        return _kind(schema["allOf"][0])
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [f"{sign} {schema[key]}" for key, sign in (("minimum", ">="), ("maximum", "<=")) if key in schema]
    default = [f"default {json.dumps(schema['default'])}"] if schema.get("default") not in (None, {}) else []
    kind = schema.get("format") or schema.get("type", "any")
    return ", ".join([str(kind), *bounds, *default])


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|").replace("\\\\|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render(openapi_document()))
