"""The service as one process: HTTP application, reconciler, and a Ray of its own if no other is named.

    SIGTERM, Ctrl-C --> the reconciler ends --> (own Ray) drivers are stopped, their jobs queued again
                    --> open requests end --> (own Ray) the cluster ends --> exit

With a cluster of somebody else's, drivers go on: they report again to whichever service comes next. A second signal
shortens the way: drivers and requests are not waited for, but nothing that was started is left behind.
"""

from __future__ import annotations

import fcntl
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from prometheus_client import Counter

from sapo_ray.control import logs
from sapo_ray.control.access import first_admin_key
from sapo_ray.control.app import create_app
from sapo_ray.control.embedded import EmbeddedRay, Stopped
from sapo_ray.control.http import configured
from sapo_ray.control.launcher import Launcher
from sapo_ray.control.launchers import launchers, wants_own_ray
from sapo_ray.control.reconciler import Hooks, Limits, Reconciler
from sapo_ray.control.reconciler.standing_down import stand_down
from sapo_ray.control.service import Control
from sapo_ray.control.settings import Settings, load_settings
from sapo_ray.control.store import Store
from sapo_ray.errors import ResourceError, SapoRayError

log = structlog.get_logger("sapo_ray.control.serve")

STAND_DOWN_S = 15.0
"""Longest wait for drivers that were stopped."""
RECONCILER_S = 25.0
"""Longest wait for the reconciler's last round: one call of the cluster's."""
REQUESTS_S = 5
"""Longest wait for requests that are open; event streams are."""
WATCH_S = 1.0
"""Pause between two looks at the service's own parts."""
BACKLOG = 2048


class Ending:
    """How the service is told to end: by signals, or by a part that cannot go on."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.hurry = threading.Event()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask; a second one asks to hurry. Only the main thread may call this."""
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked.is_set():
            self.hurry.set()
        self.asked.set()


class Server(uvicorn.Server):
    """Leaves signals to Ending: uvicorn would end the process by the signal, before anything was cleaned up."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing to capture."""
        yield


def serve(over: Mapping[str, Any] | None = None) -> None:
    """Run the service until a signal ends it; `over` goes before the environment's settings.

    Raises ConfigError, ResourceError, StoreUnavailable: it could not start; nothing is left of the try.
    """
    settings = load_settings(**(over or {}))
    logs.configure(settings.log_level)
    ending = Ending()
    with ending.on_signals(), ExitStack() as parts:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        listening = parts.enter_context(_listen(settings))
        settings = _reachable(settings, listening)
        cluster = parts.enter_context(_own_cluster(settings, ending)) if wants_own_ray(settings) else None
        if ending.asked.is_set():
            return
        store = Store(settings.database_url)
        parts.callback(store.close)
        store.migrate()
        secret = first_admin_key(store, settings)
        using = parts.enter_context(launchers(settings, cluster))
        launcher = using.launcher
        app = create_app(settings, store, launcher)
        reconciler = Reconciler(
            store,
            launcher,
            limits_of(settings),
            control_url=settings.control_url,
            hooks=_metrics(app),
            clusters=using.clusters,
        )
        _say(settings, listening, secret)
        _run(app, listening, store, launcher, reconciler, cluster, ending)


def limits_of(settings: Settings) -> Limits:
    """The reconciler's bounds as the operator set them."""
    return Limits(
        max_running_per_tenant=settings.max_running_per_tenant,
        restarts=settings.max_restarts,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        start_deadline_s=settings.start_deadline_s,
        pause_grace_s=settings.pause_grace_s,
        cancel_grace_s=settings.cancel_grace_s,
        lease_s=settings.lease_s,
        keep_clusters_s=settings.cluster_keep_s,
        tick_s=settings.reconcile_interval_s,
    )


def _run(
    app: FastAPI,
    listening: socket.socket,
    store: Store,
    launcher: Launcher,
    reconciler: Reconciler,
    cluster: EmbeddedRay | None,
    ending: Ending,
) -> None:
    """HTTP on this thread, reconciler and its guard on theirs, until the guard has ended all in order."""
    server = Server(configured(app, timeout_graceful_shutdown=REQUESTS_S))
    rounds = threading.Thread(target=reconciler.run, args=(ending.asked,), name="reconciler", daemon=True)
    failed: list[str] = []

    def guard() -> None:
        try:
            while not ending.asked.wait(WATCH_S):
                if not rounds.is_alive():
                    failed.append("the reconciler's thread died")
                    ending.asked.set()
                elif cluster is not None:
                    _mind(cluster, ending)
            rounds.join(RECONCILER_S)
            if cluster is not None and not ending.hurry.is_set():
                _stand_down(store, launcher, reconciler, ending)
        finally:
            server.should_exit = True
            server.force_exit = ending.hurry.is_set()

    watching = threading.Thread(target=guard, name="guard", daemon=True)
    rounds.start()
    watching.start()
    try:
        server.run(sockets=[listening])
    finally:
        if not ending.asked.is_set():  # not by a signal: uvicorn could not start, or gave up
            failed.append("the HTTP server ended")
            ending.asked.set()
        watching.join(RECONCILER_S + STAND_DOWN_S)
    if failed:
        raise ResourceError(f"the service ended because {' and '.join(failed)}; its log says why")


def _mind(cluster: EmbeddedRay, ending: Ending) -> None:
    """A head that died is replaced; its jobs recover from their checkpoints."""
    try:
        cluster.replace_if_dead(ending.asked)
    except Stopped:
        return
    except (SapoRayError, OSError) as error:
        log.error("cluster_not_replaced", error=str(error))
        ending.asked.wait(10.0)


def _stand_down(store: Store, launcher: Launcher, reconciler: Reconciler, ending: Ending) -> None:
    try:
        left = stand_down(store, launcher, reconciler.holder, STAND_DOWN_S, ending.hurry)
    except SapoRayError as error:
        log.warning("not_stood_down", error=str(error))
        return
    if left:
        log.warning("drivers_left", jobs=left)


@contextmanager
def _own_cluster(settings: Settings, ending: Ending) -> Iterator[EmbeddedRay]:
    with _alone(settings.data_dir):
        cluster = EmbeddedRay(settings.data_dir)
        try:
            cluster.start(ending.asked)
        except Stopped:
            log.info("stopped_while_starting")
        try:
            yield cluster
        finally:
            cluster.end()


@contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """Two services would end each other's cluster. The lock goes with the process, however it ends."""
    with (data_dir / "serve.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(
                f"another service runs with a Ray of its own in {data_dir}; end it, name another --data-dir, or let "
                "both use one cluster with --ray-jobs-url"
            ) from error
        yield


@contextmanager
def _listen(settings: Settings) -> Iterator[socket.socket]:
    """The socket, before anything is started: a port that is taken is the likeliest mistake."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((settings.host, settings.port))
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"cannot listen on {settings.host} port {settings.port}: {error}; name another with --host and --port"
            ) from error
        listening.listen(BACKLOG)
        yield listening


def _reachable(settings: Settings, listening: socket.socket) -> Settings:
    """With port 0, the port that was given."""
    if settings.port:
        return settings
    port = int(listening.getsockname()[1])
    url = settings.control_url
    return settings.model_copy(
        update={"port": port, "control_url": f"{url.removesuffix(':0')}:{port}" if url.endswith(":0") else url}
    )


def _metrics(app: FastAPI) -> Hooks:
    control: Control = app.state.control
    registry = control.telemetry.registry
    launches = Counter("sapo_driver_launches", "Drivers handed to the cluster by this process.", registry=registry)
    restarts = Counter("sapo_driver_restarts", "Drivers replaced by this process.", registry=registry)
    errors = Counter(
        "sapo_reconciler_errors",
        "What went wrong in the reconciler and is tried again: store, launcher, cluster, run_dir, bug.",
        ["kind"],
        registry=registry,
    )
    return Hooks(
        launched=lambda tenant: launches.inc(),
        restarted=lambda tenant: restarts.inc(),
        failed_round=lambda kind: errors.labels(kind).inc(),
    )


def _say(settings: Settings, listening: socket.socket, secret: str | None) -> None:
    """For the person who started it, apart from the log."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"sapo-ray serves http://{shown}:{port} (data in {settings.data_dir})", flush=True)
    if secret is not None:
        print(f"admin key, shown this once: {secret}", flush=True)


if __name__ == "__main__":
    serve()
