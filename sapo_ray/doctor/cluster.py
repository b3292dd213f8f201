"""The cluster's nodes, looked at by a job that this end submits and removes from storage again."""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from sapo_ray.control.launcher import LauncherUnavailable, LaunchRefused, RayJobs
from sapo_ray.control.settings import Settings
from sapo_ray.doctor import inside, local
from sapo_ray.doctor.findings import Check, Finding
from sapo_ray.doctor.storage import StorageTrouble, marker
from sapo_ray.doctor.versions import versions_here

BOUND_S = 420.0
"""For the whole look: two minutes for a node, two and a half for the sum, and the head's own start."""
POLL_S = 1.0
AGENT_S = 30.0
"""For a head that has just started to take jobs."""
LOG_S = 10.0
REMEDY = (
    "the head must have this sapo-ray (SAPO_DRIVER_PYTHON names its interpreter) and accept jobs; its dashboard "
    "and the logs in /tmp/ray/session_latest/logs say more"
)


def look(settings: Settings, checks: Collection[Check]) -> Iterator[Finding]:
    """What the nodes tell of themselves; bounded by BOUND_S."""
    found = None
    try:
        with (
            RayJobs(
                settings.ray_jobs_url, python=settings.driver_python or "python", token=local.token(settings)
            ) as jobs,
            ExitStack() as held,
        ):
            found = _ask(jobs, settings, checks, held)
    except (LauncherUnavailable, LaunchRefused) as error:
        yield Finding(check="ray", status="failed", detail=str(error), remedy=REMEDY, where="cluster")
        return
    if isinstance(found, str):
        yield Finding(check="ray", status="failed", detail=found, remedy=REMEDY, where="cluster")
        return
    for one in found:
        yield Finding(**one)


def _ask(jobs: RayJobs, settings: Settings, checks: Collection[Check], held: ExitStack) -> list[dict[str, Any]] | str:
    """The nodes' findings, or why there are none."""
    path, text = "", ""
    if "storage" in checks:
        with suppress(StorageTrouble):  # this end's own check of its storage says what is wrong
            written, text = held.enter_context(marker(settings.data_dir))
            path = str(written)
    asked = inside.Asked(
        checks=list(checks),
        data_dir=str(settings.data_dir),
        min_free_gb=settings.min_free_gb,
        marker=path,
        text=text,
        control=settings.control_url if "dns" in checks else "",
        versions=versions_here(),
    )
    words = [settings.driver_python or "python", "-m", "sapo_ray.doctor.inside", json.dumps(asdict(asked))]
    submission = f"sapo-doctor-{secrets.token_hex(6)}"
    deadline = time.monotonic() + BOUND_S
    _submit(jobs, submission, shlex.join(words))
    try:
        while not (status := jobs.status(submission)).over:
            if time.monotonic() > deadline:
                return f"the nodes did not tell within {BOUND_S:.0f} s"
            time.sleep(POLL_S)
    finally:
        with suppress(LauncherUnavailable):
            jobs.stop(submission)
    told = _told(jobs, submission, LOG_S if status.state == "SUCCEEDED" else 0.0)
    return told if told is not None else f"the look at the nodes ended as {status.state}: {status.message[-800:]}"


def _submit(jobs: RayJobs, submission: str, command: str) -> None:
    """Start it; a head that has just come up has no agent for jobs yet. Raises LauncherUnavailable, LaunchRefused."""
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            jobs.submit_command(submission, command)
        except LauncherUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
        else:
            return


def _told(jobs: RayJobs, submission: str, seconds: float) -> list[dict[str, Any]] | None:
    """The findings in the job's log, which may be complete a moment after its end."""
    deadline = time.monotonic() + seconds
    while True:
        lines = [line for line in jobs.logs(submission).splitlines() if line.startswith(inside.TOLD)]
        if lines:
            findings: list[dict[str, Any]] = json.loads(lines[-1].removeprefix(inside.TOLD))["findings"]
            return findings
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)
