"""Errors of the API, `application/problem+json` (RFC 9457)."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from sapo_ray.api.jobs import Wire

MEDIA_TYPE = "application/problem+json"


class FieldProblem(Wire):
    """One thing that is wrong with a request."""

    param: str | None = None
    """Dotted key, query parameter or header."""
    detail: str
    """Value, bound and remedy."""


class Problem(Wire):
    """Why a request was refused or failed."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    """URI reference of the kind of problem: `/problems/<code>`."""
    title: str
    """The kind of problem in words."""
    status: int
    """HTTP status."""
    code: str
    """Stable, for programs: unknown_key, illegal_transition, superseded, ..."""
    detail: str
    """What happened here."""
    param: str | None = None
    """What was wrong, where it is one thing."""
    hint: str | None = None
    """What to do."""
    request_id: str | None = None
    """Also in X-Request-ID and in the logs."""
    errors: list[FieldProblem] = Field(default_factory=list)
    """All problems, where there are several."""
