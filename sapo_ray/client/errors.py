"""What can go wrong between a program and the service. Every message is useful on its own.

    SapoRayError
    `-- ClientError
        |-- ConnectionFailed    no whole answer: refused, unknown host, timed out, broken off
        |-- BadReply            an answer that this client cannot read, or a file that arrived damaged
        `-- ApiError            the service answered with an error; has all fields of the problem document
            |-- Invalid         400, 413, 415, 422    the request is wrong; `errors` lists what
            |-- Unauthorized    401                   no key, or a wrong, expired or revoked one
            |-- Forbidden       403                   the key lacks the scope
            |-- NotFound        404, 410              no such thing, or it is another tenant's
            |-- Conflict        409, 412              not in this state, or changed in the meantime
            |-- RateLimited     429                   too many requests; `retry_after`
            `-- Unavailable     502, 503, 504         the service, or what it stands on, is down; `retry_after`

Waits that run out raise `sapo_ray.errors.DeadlineExceeded`, wrong arguments `sapo_ray.errors.ConfigError`.
"""

from __future__ import annotations

from sapo_ray.api.problems import Problem
from sapo_ray.errors import SapoRayError


class ClientError(SapoRayError):
    """Base of all errors of the client."""


class ConnectionFailed(ClientError):
    """The service gave no whole answer."""


class BadReply(ClientError):
    """An answer that is not what the API promises."""


class ApiError(ClientError):
    """The service answered with an error.

    `problem` holds the document whole; its fields are also attributes. `retry_after` is in seconds, where given.
    """

    def __init__(self, message: str, problem: Problem | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.problem = problem or Problem(title="error", status=0, code="unknown", detail=message)
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.problem.status

    @property
    def code(self) -> str:
        """Stable, for programs, e.g. `illegal_transition`."""
        return self.problem.code

    @property
    def param(self) -> str | None:
        """What was wrong, where it is one thing."""
        return self.problem.param

    @property
    def hint(self) -> str | None:
        """What to do."""
        return self.problem.hint

    @property
    def request_id(self) -> str | None:
        """To be found in the service's logs."""
        return self.problem.request_id


class Invalid(ApiError):
    """The request is wrong."""


class Unauthorized(ApiError):
    """No API key, or not a valid one."""


class Forbidden(ApiError):
    """The key may not do this."""


class NotFound(ApiError):
    """No such thing, as far as this key can see."""


class Conflict(ApiError):
    """Does not go together with the present state."""


class RateLimited(ApiError):
    """Too many requests."""


class Unavailable(ApiError):
    """The service cannot answer now."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    412: Conflict,
    413: Invalid,
    415: Invalid,
    422: Invalid,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def from_problem(problem: Problem, where: str, retry_after: float | None = None) -> ApiError:
    """The error of a problem document; `where` is e.g. `GET /v1/jobs`."""
    kind = _BY_STATUS.get(problem.status, ApiError)
    return kind(_message(problem, where), problem, retry_after)


def _message(problem: Problem, where: str) -> str:
    listed = [f"  - {one.param}: {one.detail}" if one.param else f"  - {one.detail}" for one in problem.errors]
    several = len(listed) > 1
    lines = [f"{problem.detail or problem.title}"]
    if several:
        lines += listed
    elif problem.errors and problem.errors[0].detail not in lines[0]:
        lines[0] += f": {listed[0].removeprefix('  - ')}"
    if problem.hint:
        lines[-1 if not several else 0] += f"; {problem.hint}"
    trace = f", request {problem.request_id}" if problem.request_id else ""
    lines[-1] += f" ({where}: {problem.status} {problem.code}{trace})"
    return "\n".join(lines)
