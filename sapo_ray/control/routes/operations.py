"""The service itself: does it live, can it work, what does it count."""

from __future__ import annotations

import shutil
import threading
import time
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from sapo_ray.api.jobs import Wire
from sapo_ray.control.access import Admin
from sapo_ray.control.documents import keyed, problems
from sapo_ray.control.launcher import LauncherUnavailable
from sapo_ray.control.problems import Refused
from sapo_ray.control.service import Control, The, respond
from sapo_ray.control.store import StoreError

router = APIRouter(tags=["service"])

REMEMBERED_S = 1.0
"""These endpoints are public: however often they are asked, database and cluster are looked at once a second."""
Up = Literal["ok", "down"]


class Alive(Wire):
    """The process answers."""

    status: Literal["ok"] = "ok"
    """Always."""


class Checks(Wire):
    """What the service stands on."""

    database: Up
    """The job store answers, and has its tables."""
    disk: Up
    """The data folder can be reached, and has room."""
    cluster: Up
    """Ray's Jobs API answers. While it is down jobs are accepted and queued."""


class Ready(Wire):
    """Whether requests are served."""

    status: Literal["ready", "degraded", "not_ready"]
    """degraded: jobs are accepted, but none is launched. not_ready: requests fail."""
    checks: Checks
    """Each dependency."""


class Readiness:
    """The newest look at the dependencies, shared by all who ask within a second."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._looked = -REMEMBERED_S
        self._found: Ready | None = None

    def look(self) -> Ready:
        """At most one look at a time, and one a second."""
        with self._lock:
            if self._found is None or time.monotonic() - self._looked >= REMEMBERED_S:
                self._found = _look(self._control)
                self._looked = time.monotonic()
            return self._found


@router.get(
    "/healthz", operation_id="healthz", summary="Is the process alive?", responses=problems(), response_model=Alive
)
async def healthz() -> Response:
    """Looks at nothing else. Public."""
    return respond(Alive())


@router.get(
    "/readyz",
    operation_id="readyz",
    summary="Can requests be served, and which dependency is down?",
    response_model=Ready,
    responses={**problems(), 503: {"description": "Not ready.", "model": Ready}},
)
def readyz(request: Request) -> Response:
    """Public, so it says no more than which: 503 if database or disk are down, 200 `degraded` if only the cluster."""
    readiness: Readiness = request.app.state.readiness
    found = readiness.look()
    return respond(found, 503 if found.status == "not_ready" else 200)


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **keyed(),
    },
)
def metrics(caller: Admin, control: The) -> Response:
    """Of all tenants, so an admin key of the operator's tenant is needed; SAPO_METRICS_PORT serves them without."""
    if not caller.operator:
        raise Refused(403, "forbidden", "metrics are of all tenants: an admin key of the operator's tenant is needed")
    return Response(generate_latest(control.telemetry.registry), media_type=CONTENT_TYPE_LATEST)


def _look(control: Control) -> Ready:
    checks = Checks(database=_database(control), disk=_disk(control), cluster=_cluster(control))
    if "down" in (checks.database, checks.disk):
        return Ready(status="not_ready", checks=checks)
    return Ready(status="degraded" if checks.cluster == "down" else "ready", checks=checks)


def _database(control: Control) -> Up:
    try:
        control.store.ping()
    except StoreError:
        return "down"
    return "ok"


def _disk(control: Control) -> Up:
    try:
        free = shutil.disk_usage(control.settings.data_dir).free
    except OSError:
        return "down"
    return "ok" if free >= control.settings.min_free_gb * 1e9 else "down"


def _cluster(control: Control) -> Up:
    try:
        control.launcher.ping()
    except LauncherUnavailable:
        return "down"
    return "ok"
