"""What a check has found, in words for whoever runs the service."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from sapo_ray.errors import DeadlineExceeded

Check = Literal["dns", "ray", "versions", "clock", "storage", "shm", "gpu", "nccl"]
CHECKS: tuple[Check, ...] = ("dns", "ray", "versions", "clock", "storage", "shm", "gpu", "nccl")
Status = Literal["ok", "warning", "failed", "skipped"]

_Found = TypeVar("_Found")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check in one place."""

    check: Check
    status: Status
    """failed: jobs will not run; warning: they run, worse than they could; skipped: it could not be told here."""
    detail: str
    remedy: str = ""
    """What to do about it; empty where nothing is to be done."""
    where: str = "here"
    """`here`, `node <address>`, or `cluster`."""


def bounded(what: str, seconds: float, work: Callable[[], _Found]) -> _Found:
    """The result of `work`, whose calls know no time-out (name look-ups, a network file system that hangs).

    Its thread, a daemon, is left behind when it does not come back. Raises DeadlineExceeded, and what `work` raises.
    """
    results: list[_Found] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name=f"doctor: {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise DeadlineExceeded(f"{what} did not come back within {seconds:g} s")
    return results[0]
