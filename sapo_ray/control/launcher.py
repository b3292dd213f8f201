"""Starting, watching and stopping drivers: a small protocol, and Ray's Jobs REST API behind it.

Ray arbitrates: a submission id is accepted once in the life of a cluster, so whoever submits a second time finds it
there and nothing is started twice. Ray's own client is not used: it has no timeouts and brings all of Ray along.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from sapo_ray.control.answers import TooLarge, last_line, read, shown
from sapo_ray.errors import SapoRayError

CONNECT_S = 3.0
"""Bound of the wait for a connection to Ray's dashboard."""
CALL_S = 20.0
"""Bound of one call of the Jobs API; a head that has just started lets a submission wait for its agent."""
MOST_BYTES = 4 << 20
"""Largest answer that is read; Ray's are a few kilobytes."""
MOST_LOG_BYTES = 64 << 20
"""Largest log that is read: Ray gives a log only as a whole. A longer one stays in the cluster."""
MESSAGE_LINES = 20
"""Last lines of a driver's log that are kept as the reason of its end."""
MESSAGE_CHARS = 1500
"""A job's reason holds 2000."""

LaunchState = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED", "UNKNOWN"]
UNREACHABLE = "the cluster cannot be reached"
"""All that a tenant is told of LauncherUnavailable."""
REFUSED = "the cluster refused to start the driver; the service's log says why"
"""All that a tenant is told of LaunchRefused."""
OVER: frozenset[LaunchState] = frozenset({"STOPPED", "SUCCEEDED", "FAILED", "UNKNOWN"})
"""No process of this submission runs: it ended, or the cluster has never heard of it."""


class LauncherUnavailable(SapoRayError):
    """Ray's Jobs API cannot be reached, or does not answer as it should; whatever was asked may or may not be done.

    The message is for the log: it names the operator's address (without its password). Tenants get UNREACHABLE.
    """


class ClusterUnavailable(LauncherUnavailable):
    """The cluster of this one driver does not answer, or cannot be made or changed now; those of others may be."""


class NotStarted(SapoRayError):
    """The driver's own cluster is still being made: submit again. The message is for the tenant too."""


class LaunchRefused(SapoRayError):
    """Asking again would change nothing: the driver will not be run. The message is for the log; tenants get `told`."""

    def __init__(self, message: str, told: str = REFUSED) -> None:
        super().__init__(message)
        self.told = told


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRequest:
    """One driver to be started."""

    submission_id: str
    """`sapo-<job>-<attempt>`; unique in the life of a cluster."""
    job_id: str
    attempt: int
    control_url: str
    """Where the driver reports, as seen from the cluster."""
    token_file: Path
    """Holds the driver's token; only its path is passed on, because Ray shows entrypoints and environments."""
    tenant: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """The job as it is stored; a cluster of its own is sized by it."""
    workers: int = 1
    """Rollout workers wanted now."""
    least_workers: int = 1
    """Rollout workers with which the job can begin."""
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchStatus:
    """What Ray says of a submission."""

    state: LaunchState
    message: str = ""
    """Why it ended, in the words of Ray; for a driver that failed the last lines of its log."""

    @property
    def over(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in OVER


class Launcher(Protocol):
    """What the reconciler needs of a cluster. All calls are bounded and raise LauncherUnavailable."""

    def ping(self) -> None:
        """Return if the cluster"""

    def submit(self, request: LaunchRequest) -> None:
        """Start a driver. Idempotent: an id that is there already is success.

        Raises LaunchRefused; NotStarted while there is nothing yet on which it could run: then call it again.
        """

    def status(self, submission_id: str) -> LaunchStatus:
        """What became of a submission; UNKNOWN if the cluster has never heard of it."""

    def stop(self, submission_id: str) -> None:
        """Ask for its end and return at once; nothing to do for what is over."""

    def logs(self, submission_id: str) -> str:
        """What the driver printed so far; empty if there is nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCluster:
    """A cluster that was made for one driver."""

    submission_id: str
    job_id: str
    attempt: int


class ClusterLauncher(Launcher, Protocol):
    """A launcher that makes a cluster for each driver. All calls are bounded and raise LauncherUnavailable."""

    def lacking(self) -> list[str]:
        """Rights that are needed and not granted, as `create secrets`; empty if all are."""

    def clusters(self) -> list[OwnCluster]:
        """Those that there are."""

    def remove(self, submission_id: str) -> None:
        """Delete a driver's cluster with all that runs in it; returns at once. Nothing to do if there is none."""

    def scale(self, submission_id: str, workers: int, busy: Collection[str] | None) -> str | None:
        """Bring the rollout nodes to those that so many workers need. Returns why some are not there yet, or None.

        `busy` are the hosts on which workers are; only others are taken away. None: not known, none is.
        """


class RayJobs:
    """The Jobs API of one Ray cluster, e.g. `RayJobs("http://127.0.0.1:8265", python="python")`.

    `python` is the interpreter as the cluster's head node calls it; it must have this package. Safe for use by several
    threads.
    """

    def __init__(self, url: str, *, python: str = "python", token: str | None = None) -> None:
        self._python = python
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(CALL_S, connect=CONNECT_S),
            trust_env=False,
            verify=url.startswith("https:"),  # certificates take long to load, and there is a client for each cluster
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ping(self) -> None:
        """Return if the dashboard"""
        self._call("GET", "/api/version")

    def entrypoint(self, request: LaunchRequest) -> str:
        """The command that the head node runs in a shell."""
        arguments = {
            "--job": request.job_id,
            "--attempt": str(request.attempt),
            "--control": request.control_url,
            "--token-file": str(request.token_file),
        }
        words = [self._python, "-m", "sapo_ray.driver.main", *(word for pair in arguments.items() for word in pair)]
        return shlex.join(words)

    def submit(self, request: LaunchRequest) -> None:
        """Start a driver on the head node; see Launcher."""
        self.submit_command(request.submission_id, self.entrypoint(request), request.metadata)

    def submit_command(self, submission_id: str, command: str, metadata: dict[str, str] | None = None) -> None:
        """Run any shell command as a submission."""
        body = {"entrypoint": command, "submission_id": submission_id, "metadata": metadata or {}}
        answer = self._call("POST", "/api/jobs/", json=body, accept=(400, 500))
        if answer.is_success:
            return
        # The head wraps the agent's refusal of an id that is taken in a plain 500, so ask what is the case.
        if self.status(submission_id).state != "UNKNOWN":
            return
        if answer.status_code == 400:
            raise LaunchRefused(f"Ray refused to start {submission_id}: {last_line(answer.text)}")
        raise LauncherUnavailable(f"Ray could not start {submission_id}: {last_line(answer.text)}")

    def status(self, submission_id: str) -> LaunchStatus:
        """What became of a submission; see Launcher."""
        answer = self._call("GET", f"/api/jobs/{quote(submission_id)}", accept=(404,))
        if _is_absent(answer):
            return LaunchStatus(state="UNKNOWN", message="the cluster does not know this submission")
        found = _parse(answer, _Details)
        return LaunchStatus(state=found.status, message=_tail(found.message or ""))

    def stop(self, submission_id: str) -> None:
        """SIGTERM to the driver and its children, SIGKILL three seconds later; returns before that happens."""
        _is_absent(self._call("POST", f"/api/jobs/{quote(submission_id)}/stop", accept=(404,)))

    def logs(self, submission_id: str) -> str:
        """What the driver printed so far; see Launcher."""
        answer = self._call("GET", f"/api/jobs/{quote(submission_id)}/logs", accept=(404,), most=MOST_LOG_BYTES)
        return "" if _is_absent(answer) else _parse(answer, _Logs).logs

    def _call(
        self,
        method: str,
        path: str,
        *,
        json: Mapping[str, object] | None = None,
        accept: tuple[int, ...] = (),
        most: int = MOST_BYTES,
    ) -> httpx.Response:
        try:
            with self._http.stream(method, path, json=json) as coming:
                answer = read(coming, most)
        except TooLarge as error:
            raise LauncherUnavailable(str(error)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise LauncherUnavailable(
                f"Ray's Jobs API at {shown(self._http.base_url)} cannot be reached ({type(error).__name__}: {error}); "
                "is the cluster up, and SAPO_RAY_JOBS_URL its dashboard?"
            ) from error
        if not answer.is_success and answer.status_code not in accept:
            raise LauncherUnavailable(
                f"{method} {shown(answer.request.url)} answered {answer.status_code}: {last_line(answer.text)}"
            )
        return answer


def _is_absent(answer: httpx.Response) -> bool:
    """Whether the cluster does not know the submission. Raises LauncherUnavailable for a 404 of anybody else's."""
    if answer.status_code != 404:
        return False
    if "does not exist" not in answer.text:  # not Ray's dashboard, or one whose job module has died
        raise LauncherUnavailable(f"{shown(answer.request.url)} answered 404: {last_line(answer.text)}")
    return True


class _Details(BaseModel):
    model_config = ConfigDict(extra="ignore")

    status: LaunchState
    message: str | None = None


class _Logs(BaseModel):
    model_config = ConfigDict(extra="ignore")

    logs: str


_Shape = TypeVar("_Shape", bound=BaseModel)


def _parse(answer: httpx.Response, shape: type[_Shape]) -> _Shape:
    try:
        return shape.model_validate_json(answer.content)
    except ValidationError as error:
        raise LauncherUnavailable(f"{shown(answer.request.url)} answered what is not Ray's: {error}") from error


def _tail(text: str) -> str:
    """The first line, which has the exit code, and the last ones, which have the reason."""
    first, *rest = text.strip().splitlines() or [""]
    last = "\n".join(rest[-MESSAGE_LINES:])[-MESSAGE_CHARS:]
    return f"{first[:200]}\n{last}" if last else first[:MESSAGE_CHARS]
