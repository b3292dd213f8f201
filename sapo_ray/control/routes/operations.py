"""The service itself: does it live, can it work, what does it count."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Literal

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from sapo_ray.api.jobs import Wire
from sapo_ray.control.access import Admin
from sapo_ray.control.disk import LOOK_S
from sapo_ray.control.documents import keyed, problems
from sapo_ray.control.launcher import LauncherUnavailable
from sapo_ray.control.problems import Refused
from sapo_ray.control.service import Control, The, respond
from sapo_ray.control.store import StoreError

log = structlog.get_logger("sapo_ray.control")
router = APIRouter(tags=["service"])

LOOK_EVERY_S = 1.0
"""These endpoints are public: however often they are asked, database and cluster are looked at once a second."""
UNASKED_S = 30.0
"""Nobody asked for so long: nothing is looked at until somebody does."""
BOUNDS_S = {"database": 5.0, "disk": LOOK_S, "cluster": 2.0}
"""What has not answered by then is down, until it answers."""
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
    """The data folder can be reached, and has room. While it is down jobs hold or wait, and uploads are refused."""
    cluster: Up
    """Ray's Jobs API answers. While it is down jobs are accepted and queued."""


class Ready(Wire):
    """Whether requests are served."""

    status: Literal["ready", "degraded", "not_ready"]
    """degraded: requests are served, but without cluster or disk jobs wait. not_ready: requests fail."""
    checks: Checks
    """Each dependency."""


class Readiness:
    """The newest look at the dependencies, which one task takes for all who ask. Asking takes no thread."""

    def __init__(self, control: Control) -> None:
        self._looks: dict[str, Callable[[Control], Up]] = {"database": _database, "disk": _disk, "cluster": _cluster}
        self._control = control
        self._threads = CapacityLimiter(len(self._looks))
        self._under_way: dict[str, asyncio.Task[Up]] = {}
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[Ready] | None = None
        self._found: Ready | None = None
        self._asked = 0.0

    async def ask(self) -> Ready:
        """What the newest look found; only the first who asks after a while waits for one, at most BOUNDS_S."""
        self._asked = time.monotonic()
        if self._task is None or self._task.done():
            self._found, self._first = None, asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(self._first), name="readiness")
        if self._found is not None:
            return self._found
        assert self._first is not None
        return await asyncio.shield(self._first)

    async def close(self) -> None:
        """End the task, and wait for no look."""
        for task in [self._task, *self._under_way.values()]:
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _run(self, first: asyncio.Future[Ready]) -> None:
        self._under_way.clear()
        while time.monotonic() - self._asked < UNASKED_S:
            ups = await asyncio.gather(*(self._look(name) for name in self._looks))
            self._found = _ready(Checks(**dict(zip(self._looks, ups, strict=True))))
            if not first.done():
                first.set_result(self._found)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, name: str) -> Up:
        """Ask one dependency, and not again before it has answered: one thread each, however long it takes."""
        task = self._under_way.get(name)
        if task is None:
            work = to_thread.run_sync(self._looks[name], self._control, limiter=self._threads, abandon_on_cancel=True)
            task = self._under_way[name] = asyncio.create_task(work)
        done, _ = await asyncio.wait({task}, timeout=BOUNDS_S[name])
        if not done:
            return "down"
        del self._under_way[name]
        try:
            return task.result()
        except Exception:
            log.exception("readiness", of=name)
            return "down"


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
async def readyz(request: Request) -> Response:
    """Public, so it says no more than which: 503 if the database is down, 200 `degraded` if only others are.

    Whoever sends requests only to replicas that are ready must not cut off all of them for what they share and can do
    without: drivers that hold for a full disk report here, and would be given up for their silence.
    """
    readiness: Readiness = request.app.state.readiness
    found = await readiness.ask()
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


def _ready(checks: Checks) -> Ready:
    if checks.database == "down":
        return Ready(status="not_ready", checks=checks)
    return Ready(status="degraded" if "down" in (checks.disk, checks.cluster) else "ready", checks=checks)


def _database(control: Control) -> Up:
    try:
        control.store.ping()
    except StoreError:
        return "down"
    return "ok"


def _disk(control: Control) -> Up:
    return "ok" if control.disk.usable() else "down"


def _cluster(control: Control) -> Up:
    try:
        control.launcher.ping()
    except LauncherUnavailable:
        return "down"
    return "ok"
