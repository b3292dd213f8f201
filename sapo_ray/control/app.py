"""The application: routes, and what surrounds them. It launches nothing; that is the reconciler's."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI
from prometheus_client import start_http_server
from starlette.concurrency import run_in_threadpool

from sapo_ray import __version__
from sapo_ray.control import documents, problems
from sapo_ray.control.access import Gate
from sapo_ray.control.disk import DataDisk
from sapo_ray.control.edge import Edge
from sapo_ray.control.launcher import Launcher
from sapo_ray.control.routes import ROUTERS
from sapo_ray.control.routes.operations import Readiness
from sapo_ray.control.service import Control
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import Store
from sapo_ray.control.telemetry import Telemetry
from sapo_ray.control.watch import Watcher

log = structlog.get_logger("sapo_ray.control")

LEFT_BEHIND_S = 3600.0
"""What a process that was killed left half done, and is this old, is removed at a start."""


def create_app(settings: Settings, store: Store, launcher: Launcher) -> FastAPI:
    """The service as an ASGI application. `store` must be migrated; whoever made it closes it.

    `app.state.control` holds its parts. Nothing of Ray, torch or vLLM is imported.
    """
    gate = Gate(store, settings)
    watcher = Watcher(store, interval_s=settings.watch_interval_s, most_per_tenant=settings.max_streams_per_tenant)
    disk = DataDisk(settings.data_dir, settings.min_free_gb)
    telemetry = Telemetry(store, lambda: watcher.open_streams, disk.usable)
    control = Control(
        settings=settings, store=store, launcher=launcher, disk=disk, gate=gate, watcher=watcher, telemetry=telemetry
    )
    app = FastAPI(
        title="sapo-ray",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.control = control
    app.state.readiness = Readiness(control)
    for router in ROUTERS:
        app.router.routes.extend(router.routes)  # as they are: `include_router` would make each a second time
    problems.install(app)
    app.add_middleware(Edge, limit_of=lambda method, path: _limit(settings, method, path), observe=telemetry.observe)
    described: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not described:
            described.update(documents.describe(app))
        return described

    app.openapi = openapi  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    control: Control = app.state.control
    settings = control.settings
    await run_in_threadpool(_tidy, settings)
    server = None
    if settings.metrics_port is not None:
        server, _ = start_http_server(settings.metrics_port, settings.metrics_host, control.telemetry.registry)
    log.info("started", version=__version__, data_dir=str(settings.data_dir))
    yield
    await control.watcher.close()
    await app.state.readiness.close()
    if server is not None:
        await run_in_threadpool(server.shutdown)
    log.info("stopped")


def _tidy(settings: Settings) -> None:
    """Make the folders, and finish what a killed process had begun to delete or to receive."""
    for folder in (settings.runs_dir, settings.datasets_dir, settings.trash_dir):
        folder.mkdir(parents=True, exist_ok=True)
    old = time.time() - LEFT_BEHIND_S  # another replica may be at work on younger ones
    for run in settings.trash_dir.iterdir():
        if run.lstat().st_ctime < old:
            shutil.rmtree(run, ignore_errors=True)
    for upload in settings.datasets_dir.glob("*/.upload-*"):
        if _older(upload, old):
            upload.unlink(missing_ok=True)


def _older(path: Path, than: float) -> bool:
    try:
        return path.lstat().st_mtime < than
    except FileNotFoundError:
        return False


def _limit(settings: Settings, method: str, path: str) -> int:
    """Bytes that a body may have."""
    if path.startswith("/v1/link/"):
        return settings.max_link_bytes
    if path == "/v1/datasets" and method == "POST":
        return settings.max_upload_bytes + (1 << 16)  # the form around the file
    return settings.max_body_bytes
