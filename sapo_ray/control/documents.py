"""How routes describe themselves in the OpenAPI document, and the document's finish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sapo_ray import __version__
from sapo_ray.api.problems import MEDIA_TYPE, Problem
from sapo_ray.config.spec import JobSpec

REF = "#/components/schemas/"
_REASONS = {
    400: ("The request cannot be read: malformed JSON, invalid UTF-8, a bad cursor.", "malformed_json"),
    401: ("No key, or one that is unknown, revoked or expired.", "unauthenticated"),
    403: ("The key lacks the scope, or the operator does not allow what the job names.", "forbidden"),
    404: ("There is no such thing, or it is another tenant's.", "not_found"),
    409: ("The job's state does not permit this (`state` says which it is), or the first request with this "
          "idempotency key is under way.", "illegal_transition"),
    412: ("The job was changed since: its ETag is another.", "stale_etag"),
    413: ("The body is too large.", "too_large"),
    415: ("The body is of another media type.", "unsupported_media_type"),
    416: ("The range lies beyond the file.", "range_not_satisfiable"),
    422: ("Understood, but wrong; `errors` lists every problem. Also: an idempotency key that came with another "
          "request before.", "invalid_request"),
    429: ("Too many requests of this key; Retry-After says when to go on.", "rate_limited"),
    500: ("A bug in the service; its log has more under the request id.", "internal"),
    503: ("The job store or the cluster does not answer; Retry-After says when to try again.", "unavailable"),
    507: ("The service has not enough disk.", "disk_full"),
}  # fmt: skip
Responses = dict[int | str, dict[str, Any]]
_BODIES: dict[str, type[BaseModel]] = {}
"""Models of bodies that FastAPI does not see, because they are read after the key was checked."""


def problems(*statuses: int) -> Responses:
    """The problems that a route answers with, beside 429, 500 and 503."""
    return {status: _problem(status) for status in sorted({*statuses, 429, 500, 503})}


def keyed(*statuses: int) -> Responses:
    """`problems` of a route that needs a key; 422 is for parameters."""
    return problems(401, 403, 422, *statuses)


def changing(*statuses: int) -> Responses:
    """`keyed` of a route that has a JSON body."""
    return keyed(400, 413, 415, *statuses)


def _problem(status: int) -> dict[str, Any]:
    text, code = _REASONS[status]
    example = {"type": f"/problems/{code}", "title": "...", "status": status, "code": code, "detail": text}
    answer: dict[str, Any] = {
        "description": text,
        "content": {MEDIA_TYPE: {"schema": {"$ref": f"{REF}Problem"}, "example": example}},
    }
    if status in (429, 503):
        answer["headers"] = {"Retry-After": _header("Seconds to wait.", "integer")}
    return answer


def headers(**described: str) -> dict[str, Any]:
    """Response headers: `ETag="..."`; underscores become dashes."""
    return {name.replace("_", "-"): _header(text) for name, text in described.items()}


def _header(text: str, kind: str = "string") -> dict[str, Any]:
    return {"description": text, "schema": {"type": kind}}


ETAG = headers(ETag="The job's ETag, for If-Match.")
MADE = ETAG | headers(
    Location="Where the job is.", Idempotent_Replayed="`true` if this is the answer of an earlier request."
)


def json_body(model: type[BaseModel], examples: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself."""
    content = {"schema": {"$ref": REF + model.__name__}, "examples": {k: {"value": v} for k, v in examples.items()}}
    _BODIES[model.__name__] = model
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def file_answer(media_type: str, text: str) -> Responses:
    """200 and 206 of a route that sends a file."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    common = headers(ETag="Of this version of the file.", Accept_Ranges="`bytes`.")
    part = common | headers(Content_Range="First and last byte, and the size.")
    return {
        200: {"description": text, "content": content, "headers": common},
        206: {"description": "The range that was asked for.", "content": content, "headers": part},
    }


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application that has the routes."""
    document = get_openapi(
        title="sapo-ray",
        version=__version__,
        summary="Reinforcement learning of language models as jobs over REST.",
        description=_DESCRIPTION,
        routes=app.routes,
        tags=_TAGS,
    )
    schemas = document["components"]["schemas"]
    models: list[type[BaseModel]] = [*_BODIES.values(), Problem, JobSpec]
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=REF + "{model}")
    schemas |= found["$defs"]
    schemas["JobSpecInput"] = _as_input(schemas["JobSpec"])
    for operations in document["paths"].values():
        for operation in operations.values():
            for answer in operation["responses"].values():
                if answer["description"] == "Successful Response":
                    answer["description"] = f"{operation['summary']}."
    _finish(document)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    return document


def _as_input(schema: dict[str, Any]) -> dict[str, Any]:
    """A job as it is submitted: a preset may bring what is required otherwise."""
    given = {key: value for key, value in schema.items() if key != "required"}
    given["anyOf"] = [
        {"required": ["preset"], "properties": {"preset": {"type": "string"}}},
        {"required": schema["required"]},
    ]
    given["description"] = "A training job as submitted; a preset's values lie beneath those given here."
    return given


def _finish(node: Any) -> None:
    """Put references where models had to leave a mark, and drop generated titles."""
    if isinstance(node, dict):
        if "x-schema" in node:
            name = node.pop("x-schema")
            text = node.get("description")
            node.clear()
            node.update({"allOf": [{"$ref": REF + name}]} | ({"description": text} if text else {}))
            return
        if isinstance(node.get("title"), str) and ("type" in node or "anyOf" in node or "$ref" in node):
            del node["title"]
        for value in node.values():
            _finish(value)
    elif isinstance(node, list):
        for value in node:
            _finish(value)


_DESCRIPTION = """\
`POST /v1/jobs` takes a job, and everything else here watches it, steers it, and fetches what it made.

- **Keys.** Every request carries `Authorization: Bearer sapo_...`. A key belongs to a tenant and has scopes: `read`
  looks, `submit` makes and changes, `admin` does both and manages keys. What belongs to another tenant is 404.
- **Errors** are `application/problem+json` (RFC 9457) with `code` for programs, `param`, `hint`, `request_id`, and
  every problem in `errors`. `X-Request-ID` is taken from the request or made, and is in the service's log.
- **Repetition.** POST with `Idempotency-Key` is done once; the same key gives the first answer again for 24 hours.
- **Changes** take `If-Match` with the ETag that GET gave, `"g<generation>"`; it changes only when a user changes the
  job, not when the job gets on.
- **Lists** are pages: pass `next` as `after` while `has_more`.
- **Limits** are per key and per replica of the service; beyond them the answer is 429 with `Retry-After`.
- Unknown parameters and keys are refused, not passed over.
"""
_TAGS = [
    {"name": "jobs", "description": "Submit, list, change, remove."},
    {"name": "control", "description": "Pause, resume, cancel, checkpoint, scale."},
    {"name": "watch", "description": "Events, workers, metrics, samples, logs."},
    {"name": "files", "description": "Checkpoints and the trained model."},
    {"name": "data", "description": "Data sets and models that jobs may use."},
    {"name": "keys", "description": "API keys."},
    {"name": "service", "description": "The service itself."},
    {"name": "link", "description": "Between a driver and the service; not for users."},
]
