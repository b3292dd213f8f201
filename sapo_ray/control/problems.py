"""Every error that leaves the service is a problem document (RFC 9457), and none shows how the service is made.

`Refused` is what routes raise. Whatever else goes wrong - validation, unknown routes, a database that is gone, a bug -
is turned into the same shape by the handlers at the end.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from sapo_ray.api.problems import MEDIA_TYPE, FieldProblem, Problem
from sapo_ray.config.problems import MOST_PROBLEMS, MOST_SUGGESTIONS
from sapo_ray.control.launcher import LauncherUnavailable
from sapo_ray.control.store import (
    BadBatch,
    BadCursor,
    DriverExiting,
    IllegalTransition,
    KeyInFlight,
    KeyReused,
    SequenceGap,
    StoreError,
    StoreUnavailable,
    Superseded,
)

log = structlog.get_logger("sapo_ray.control")

RETRY_S = 2
"""Retry-After where the service itself is the reason."""

TITLES = {
    "malformed_json": "The body is not JSON",
    "invalid_text": "Text that cannot be stored",
    "bad_cursor": "The cursor is not one of this list",
    "unauthenticated": "No valid key",
    "forbidden": "The key lacks a scope",
    "not_allowed": "The operator does not allow this",
    "not_found": "Nothing is there",
    "method_not_allowed": "The method does not fit the address",
    "illegal_transition": "The job's state does not permit this",
    "superseded": "A newer attempt has the job",
    "sequence_gap": "Events are missing in between",
    "in_flight": "The first request with this key is still under way",
    "key_reused": "The idempotency key was used for another request",
    "stale_etag": "The job was changed meanwhile",
    "too_large": "Too large",
    "stalled": "The body stopped coming",
    "unsupported_media_type": "The body is of another kind",
    "invalid_job": "The job is wrong",
    "invalid_request": "The request is wrong",
    "invalid_dataset": "The data set is wrong",
    "range_not_satisfiable": "The range lies beyond the file",
    "rate_limited": "Too many requests",
    "quota_exceeded": "More than the tenant may have",
    "internal": "A bug in the service",
    "unavailable": "Not available for the moment",
    "disk_full": "Not enough disk",
}
_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class Refused(HTTPException):
    """A request that is answered with a problem. An HTTPException, so that FastAPI lets it pass wherever it arises."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        hint: str | None = None,
        errors: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
        **extensions: Any,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.problem = Problem(
            type=f"/problems/{code}",
            title=TITLES[code],
            status=status,
            code=code,
            detail=detail,
            param=param,
            hint=hint,
            errors=list(errors),
            **extensions,
        )


def not_found(what: str) -> Refused:
    """404 that does not tell whether the thing is another tenant's or nobody's."""
    return Refused(404, "not_found", f"there is no {what}", hint="check the id; what belongs to others is not shown")


def invalid(detail: str, param: str | None = None, *, code: str = "invalid_request", status: int = 422) -> Refused:
    """A request that is understood but wrong, in one place."""
    return Refused(status, code, detail, param=param, errors=[FieldProblem(param=param, detail=detail)])


def several(problems: Sequence[FieldProblem], *, code: str, status: int, what: str) -> Refused:
    """One answer for all problems that were found; `what` opens the sentence where there are several."""
    first = problems[0]
    many = len(problems) > MOST_PROBLEMS
    count, listed = (f"more than {MOST_PROBLEMS}", "the first") if many else (len(problems), "them")
    detail = first.detail if len(problems) == 1 else f"{what} has {count} problems; `errors` lists {listed}"
    return Refused(status, code, detail, param=first.param, errors=problems)


def unavailable(detail: str, status: int = 503) -> Refused:
    """Something the service needs is gone for the moment."""
    return Refused(
        status,
        "unavailable",
        detail,
        hint="send the request again; with an Idempotency-Key nothing is done twice",
        headers={"Retry-After": str(RETRY_S)},
    )


def respond(request: Request, error: Refused) -> Response:
    """The problem as a response, with the request's id."""
    problem = error.problem.model_copy(update={"request_id": request.scope.get("sapo_request_id")})
    body = problem.model_dump(mode="json", exclude_none=True)
    if not body["errors"]:
        del body["errors"]
    text = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    return Response(text, problem.status, dict(error.headers or {}), media_type=MEDIA_TYPE)


def translate(error: Exception) -> Refused | None:
    """The answer to errors of the store and of Ray; None for anything unforeseen."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, StoreUnavailable):
        return unavailable("the job store cannot be reached, is busy or is full; nothing was changed")
    if isinstance(error, LauncherUnavailable):
        return unavailable("the cluster cannot be reached")
    if isinstance(error, IllegalTransition):
        return illegal(error.current)
    if isinstance(error, DriverExiting):
        return Refused(
            409,
            "illegal_transition",
            f"the job is {error.current}, and its driver is still exiting",
            hint="send the request again in a moment",
            headers={"Retry-After": str(error.retry_after_s)},
            state=error.current,
        )
    if isinstance(error, Superseded):
        return Refused(
            409,
            "superseded",
            f"attempt {error.current_attempt} has this job now",
            hint="end this process; what it would report is void",
            current_attempt=error.current_attempt,
        )
    if isinstance(error, SequenceGap):
        return Refused(409, "sequence_gap", f"event {error.expected} comes next", expected=error.expected)
    if isinstance(error, BadCursor):
        return Refused(400, "bad_cursor", str(error), param="after", hint="leave it out to begin")
    if isinstance(error, BadBatch):
        return invalid(str(error), "events")
    if isinstance(error, KeyInFlight):
        return Refused(
            409,
            "in_flight",
            "a request with this Idempotency-Key has not been answered yet",
            param="Idempotency-Key",
            hint="wait, then send the same request again",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, KeyReused):
        return Refused(
            422,
            "key_reused",
            "this Idempotency-Key came with another request before; its answer would not fit this one",
            param="Idempotency-Key",
            hint="take a new key for a new request",
        )
    return None


def illegal(state: str, asked: str = "this", hint: str | None = None) -> Refused:
    """409 for a change that the job's state does not permit."""
    return Refused(409, "illegal_transition", f"a job that is {state} does not permit {asked}", hint=hint, state=state)


def install(app: FastAPI) -> None:
    """Let every error leave the application as a problem."""

    async def expected(request: Request, error: Exception) -> Response:
        answer = translate(error)
        if answer is None:
            return unforeseen(request, error)
        if answer.problem.status >= 500:
            log.warning("unavailable", error=type(error).__name__, reason=str(error)[:500])
        return respond(request, answer)

    for kind in (Refused, StoreError, LauncherUnavailable):
        app.add_exception_handler(kind, expected)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(ResponseValidationError, _unforeseen)


def unforeseen(request: Request, error: Exception) -> Response:
    """500: the log has everything, the answer has the request's id."""
    log.error("unhandled", error=type(error).__name__, exc_info=error)
    return respond(
        request, Refused(500, "internal", "something unforeseen happened; the log has it under this request id")
    )


async def _unforeseen(request: Request, error: Exception) -> Response:
    return unforeseen(request, error)


async def _http(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown address, wrong method, a body that FastAPI could not read."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return respond(request, Refused(404, "not_found", f"there is nothing at {request.url.path!r}"))
    if error.status_code == 405:
        allowed = ", ".join(allowed_methods(request))
        detail = f"{request.method} does not go with {request.url.path!r}; what goes is {allowed}"
        return respond(request, Refused(405, "method_not_allowed", detail, headers={"Allow": allowed}))
    code = _CODES.get(error.status_code, "invalid_request")
    return respond(request, Refused(error.status_code, code, _phrase(error), headers=error.headers))


def allowed_methods(request: Request) -> list[str]:
    """All methods of the address; one address may be several routes."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


def _phrase(error: HTTPException) -> str:
    return str(error.detail) or HTTPStatus(error.status_code).phrase


async def _validation(request: Request, error: Exception) -> Response:
    """Path, query and header parameters against their declared shape: all problems at once."""
    assert isinstance(error, RequestValidationError)
    return respond(request, wrong_shape([{**one, "loc": one["loc"][1:]} for one in error.errors()]))


def wrong_shape(problems: Sequence[Mapping[str, Any]], known: Sequence[str] = ()) -> Refused:
    """422 for pydantic's findings; `known` are the names that the outermost mapping has."""
    listed = [_field(one, known, number < MOST_SUGGESTIONS) for number, one in enumerate(problems[:MOST_PROBLEMS])]
    if len(problems) > MOST_PROBLEMS:
        more = f"{len(problems) - MOST_PROBLEMS} more problems are not listed; correct these first"
        listed.append(FieldProblem(param=None, detail=more))
    return several(listed, code="invalid_request", status=422, what="the request")


def _field(problem: Mapping[str, Any], known: Sequence[str], suggest: bool) -> FieldProblem:
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    param = ".".join(location) or None
    if problem["type"] == "missing":
        detail = f"{param or 'the body'} is missing"
    elif problem["type"] == "extra_forbidden":
        near = did_you_mean(location[0], known) if suggest and len(location) == 1 else ""
        detail = f"{param} is not known here{near}"
    else:
        shown = repr(problem.get("input"))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        text = problem["msg"].removeprefix("Value error, ")
        detail = f"{param or 'the body'}: {text[:1].lower()}{text[1:]}, got {shown}"
    return FieldProblem(param=param, detail=detail)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`; did you mean limit?`, or what there is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are: {', '.join(sorted(known))}" if known else "; none is known here"
