"""`quickstart`: a whole round through the service, started for the occasion and ended with it.

    start service (child process) --> ready --> submit --> events into the display --> result --> end the service
                                        |                        |
                                        +-- Ctrl-C, SIGTERM -----+--> cancel the job, wait a little --> end the service

The child dies with this process, however that ends, so that nothing is left behind.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from sapo_ray.cli.options import Overrides, console
from sapo_ray.ending import user_errors
from sapo_ray.errors import DeadlineExceeded, ResourceError, SapoRayError
from sapo_ray.terminal import shown

if TYPE_CHECKING:
    from sapo_ray.client import Client

READY_S = 180.0
"""Longest start of the service, local Ray included."""
CANCEL_S = 60.0
"""Longest wait for a job that is cancelled because the command was."""
STOP_S = 60.0
"""Longest orderly end of the service; then it is killed."""
LEFT_S = 10.0
"""Longest wait for what the service had started, after its end; then it is killed."""
RUN_S = 6 * 3600.0
PR_SET_PDEATHSIG = 1
CHILD = (sys.executable, "-c", "from sapo_ray.cli.quickstart import child; child()")


def quickstart(
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB.yaml]", help="The job; configs/quickstart.yaml if not given.")
    ] = None,
    set_: Overrides = None,
    data_dir: Annotated[Path, typer.Option(help="Where the service keeps jobs, runs and models.")] = Path("sapo-data"),
) -> None:
    """Start a service on this machine, train the smallest job through it, show the result, stop the service."""
    from sapo_ray.config.job_file import read_job
    from sapo_ray.config.load import with_overrides

    with user_errors():
        default = Path("configs/quickstart.yaml")
        path = job or (default if default.is_file() else None)
        spec = {"preset": "quickstart"} if path is None else read_job(path)
        state = _run(with_overrides(spec, set_ or [], source=str(path or "quickstart")), data_dir.absolute())
    if state != "succeeded":
        raise typer.Exit(1)


def _run(spec: dict[str, object], data_dir: Path) -> str:
    """The job's last state."""
    from sapo_ray.cli.showing import JobDisplay, print_end

    key = _key(data_dir)
    with _serving(data_dir, key) as client:
        submitted = client.jobs.submit(spec)
        console.print(f"service {client.base_url}, job {submitted.id}", highlight=False, soft_wrap=True)
        try:
            with JobDisplay(console) as display:
                ended = client.jobs.wait(submitted.id, RUN_S, display)
        except BaseException:
            _cancel(client, submitted.id)
            raise
        print_end(console, ended)
    return ended.status.state


def _key(data_dir: Path) -> str:
    """One admin key for all rounds in this folder; a new one each time would pile up in its store."""
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / "quickstart.key"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"sapo_{secrets.token_urlsafe(32)}\n")
    return path.read_text().strip()


def _cancel(client: Client, job_id: str) -> None:
    """End the job before the service ends. A second Ctrl-C ends the wait."""
    console.print(f"cancelling {job_id} ...", highlight=False)
    try:
        client.jobs.cancel(job_id)
        client.jobs.wait(job_id, CANCEL_S, through_pause=True)
    except SapoRayError as error:
        console.print(f"[yellow]{shown(str(error))}[/]; the service ends all the same", highlight=False)


@contextmanager
def _serving(data_dir: Path, key: str) -> Iterator[Client]:
    """A service of our own until the end of the block."""
    from sapo_ray.client import Client

    port = _free_port()
    log = data_dir / "serve.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*CHILD, "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(data_dir)],
            env={**os.environ, "SAPO_ADMIN_KEY": key, "SAPO_QUICKSTART_PARENT": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; the service is told when the job has ended
        )
    try:
        with Client(f"http://127.0.0.1:{port}", key) as client:
            with console.status("starting the service") if console.is_terminal else nullcontext():
                _until_ready(client, child, log)
            yield client
    finally:
        _stop(child)


def _until_ready(client: Client, child: subprocess.Popen[bytes], log: Path) -> None:
    from sapo_ray.client import ApiError, ConnectionFailed

    end = time.monotonic() + READY_S
    while True:
        code = child.poll()
        if code is not None:
            raise ResourceError(f"the service ended while it started (exit code {code}):\n{_tail(log)}")
        try:
            state = str(client.ready()["status"])
            if state == "ready":
                return
        except (ApiError, ConnectionFailed) as error:
            state = str(error)
        if time.monotonic() > end:
            raise DeadlineExceeded(
                f"the service was not ready after {READY_S:g} s ({state}); its last lines:\n{_tail(log)}"
            )
        time.sleep(0.25)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """In order if it can be, at once if it must be; then nothing that it started is left."""
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(child.pid).children(recursive=True)
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                console.print(f"[yellow]the service did not end within {STOP_S:g} s; it is killed[/]", highlight=False)
                child.kill()
        for one in psutil.wait_procs(started, timeout=LEFT_S)[1]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    child.wait(STOP_S)


def child() -> None:
    """The service's process."""
    die_with_parent()
    from sapo_ray.cli import main

    main()


def die_with_parent() -> None:
    """SIGTERM to this process when the command that started it ends, whatever ends that."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ.pop("SAPO_QUICKSTART_PARENT")):  # it died before prctl
        sys.exit(143)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
