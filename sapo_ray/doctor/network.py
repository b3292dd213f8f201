"""Names, the cluster's dashboard, and whose clock is right."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any

import httpx

from sapo_ray.doctor.findings import Finding, bounded
from sapo_ray.errors import DeadlineExceeded

RESOLVE_S = 10.0
CALL_S = 10.0
MOST_OFFSET_S = 5.0
"""Clocks that differ more make leases change hands too early or too late, and tokens invalid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dashboard:
    """What a Ray's dashboard answered."""

    version: str
    date: str | None
    """Its Date header."""
    asked: float
    answered: float
    """Unix times of this machine."""


def check_dns(hosts: dict[str, str]) -> list[Finding]:
    """Look every host up; `hosts` is what it is for, by host. Addresses need no look-up."""
    findings = []
    for host, purpose in hosts.items():
        if _is_address(host):
            continue
        try:
            found = bounded(f"looking up {host}", RESOLVE_S, lambda host=host: socket.getaddrinfo(host, None))  # type: ignore[misc]
        except (OSError, UnicodeError, DeadlineExceeded) as error:
            detail = f"{host} ({purpose}) is not known: {error}"
            remedy = (
                "is the name right, and may this machine ask its name server (NetworkPolicy: port 53, UDP and TCP)?"
            )
            findings.append(Finding(check="dns", status="failed", detail=detail, remedy=remedy))
        else:
            addresses = ", ".join(sorted({str(one[4][0]) for one in found}))
            findings.append(Finding(check="dns", status="ok", detail=f"{host} ({purpose}) is {addresses}"))
    return findings or [
        Finding(check="dns", status="skipped", detail="all addresses are numbers: no name is looked up")
    ]


def check_ray(url: str, token: str | None) -> tuple[Finding, Dashboard | None]:
    """Ask Ray's dashboard for its version."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    asked = time.time()
    try:
        answer = httpx.get(url.rstrip("/") + "/api/version", headers=headers, timeout=CALL_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = (
            "is the head up, is SAPO_RAY_JOBS_URL its dashboard (port 8265, started with --dashboard-host=0.0.0.0), "
            "and does a NetworkPolicy let this machine reach it?"
        )
        detail = f"{_shown(url)} cannot be reached: {type(error).__name__}: {error}"
        return Finding(check="ray", status="failed", detail=detail, remedy=remedy), None
    if answer.status_code in (401, 403):
        remedy = "put the cluster's token into SAPO_RAY_AUTH_TOKEN: the one that its nodes have in RAY_AUTH_TOKEN"
        what = "another token" if token else "a token"
        detail = f"{_shown(url)} answered {answer.status_code}: it wants {what}"
        return Finding(check="ray", status="failed", detail=detail, remedy=remedy), None
    version = _ray_version(answer)
    if version is None:
        remedy = (
            "SAPO_RAY_JOBS_URL must be the dashboard of a Ray cluster (port 8265), not GCS (6379) or another service"
        )
        detail = f"{_shown(url)} answered {answer.status_code}, and not as Ray does"
        return Finding(check="ray", status="failed", detail=detail, remedy=remedy), None
    told = Dashboard(version=version, date=answer.headers.get("date"), asked=asked, answered=time.time())
    return Finding(check="ray", status="ok", detail=f"Ray {version} answers at {_shown(url)}"), told


def check_clock(told: Dashboard) -> Finding:
    """This machine's clock beside the cluster's head, by the Date of its answer, which is of whole seconds."""
    try:
        date = parsedate_to_datetime(told.date or "").timestamp() + 0.5
    except ValueError:
        return Finding(check="clock", status="skipped", detail="Ray's answer bears no readable Date")
    offset = date - (told.asked + told.answered) / 2
    doubt = 0.5 + (told.answered - told.asked) / 2
    return clock_finding(offset, doubt, "the cluster's head", "here")


def clock_finding(offset: float, doubt: float, other: str, where: str) -> Finding:
    """`offset` seconds of the other's clock before this one, known up to `doubt`."""
    if abs(offset) <= MOST_OFFSET_S + doubt:
        return Finding(
            check="clock", status="ok", detail=f"{other} agrees up to {abs(offset) + doubt:.1f} s", where=where
        )
    way = "ahead" if offset > 0 else "behind"
    detail = f"{other} is {abs(offset):.0f} s {way}; at most {MOST_OFFSET_S:.0f} s may be"
    remedy = "let both machines keep time by NTP (chronyd, systemd-timesyncd), and look which of them is wrong"
    return Finding(check="clock", status="failed", detail=detail, remedy=remedy, where=where)


def _ray_version(answer: httpx.Response) -> str | None:
    try:
        content: Any = answer.json()
    except ValueError:
        return None
    found = content.get("ray_version") if isinstance(content, dict) and answer.is_success else None
    return found if isinstance(found, str) else None


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _shown(url: str) -> str:
    """Without user and password."""
    try:
        return str(httpx.URL(url).copy_with(username=None, password=None))
    except httpx.InvalidURL:
        return "(not an address)"
