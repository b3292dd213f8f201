"""A driver that a control plane starts, once per attempt: `python -m sapo_ray.driver.main --job ID --attempt N ...`.

    token file --> assignment --> the run directory is this attempt's --> run.assigned --> exit code

    0      succeeded, paused, cancelled        3    superseded: another attempt has the run, nothing more was written;
                                                    or its token was refused for long: paused, nothing is lost
    1      failed, the journal says why        4    the control plane gave no assignment within ASSIGNMENT_S
    143    SIGTERM                             2    wrong usage

Secrets of the job go into this process's environment only: not into arguments, events, or Ray's runtime environments,
which Ray logs.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapo_ray.api.link import Assignment
from sapo_ray.config.load import check_resume, resolve
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.link import Link
from sapo_ray.driver.masking import MaskingFormatter, hidden
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.rundir import begin_attempt, hold_within, read_stored
from sapo_ray.driver.wire import Away, Refusals, SequenceGap, TooLarge, Unacceptable, Unauthorized, Wire
from sapo_ray.errors import DeadlineExceeded, SapoRayError, Superseded

log = logging.getLogger(__name__)

ASSIGNMENT_S = 300.0
"""A control plane that is being restarted is back within this."""
RETRY_S = 10.0
"""Longest pause between two tries."""
PREDECESSOR_S = 60.0
"""An attempt that was superseded notices, and lets go of the run, within this."""
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FAILED, SUPERSEDED, NO_ASSIGNMENT, TERMINATED = 1, 3, 4, 143


def main(arguments: list[str] | None = None) -> int:
    """Run one attempt; returns the exit code."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format=LINE)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line a heartbeat otherwise
    signal.signal(signal.SIGTERM, _terminate)
    try:
        token = options.token_file.read_text().strip()
        wire = Wire(options.control, options.job, options.attempt, token)
        assignment = fetch(wire)
    except (OSError, DeadlineExceeded) as error:
        return _say(NO_ASSIGNMENT, error)
    except Superseded as error:
        return _say(SUPERSEDED, error)
    try:
        result = run(assignment, wire)
    except Superseded as error:
        return _say(SUPERSEDED, error)
    except SapoRayError as error:
        return _say(FAILED, error)
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        return _say(TERMINATED, error)
    except Exception:
        log.exception("the driver failed")  # not raised: Python would write it again, with what logs leave out
        return FAILED
    finally:
        wire.close()
    log.info("%s: %s", result["status"], result["reason"])
    return 0


def fetch(wire: Wire) -> Assignment:
    """The assignment, asked for until it comes.

    Raises:
        Superseded: the attempt is not wanted any more.
        DeadlineExceeded: there was no usable answer within ASSIGNMENT_S.
    """
    end, tries, refusals = time.monotonic() + ASSIGNMENT_S, 0, Refusals()
    while True:
        try:
            return wire.assignment()
        except (Away, SequenceGap, TooLarge, Unacceptable) as error:
            tries += 1
            if isinstance(error, Unauthorized) and refusals.add():
                raise Superseded(
                    f"the control plane refused this attempt's token for {refusals.within_s:g} s and more: {error}"
                ) from error
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"no assignment within {ASSIGNMENT_S:g} s: {error}") from error
            log.warning("no assignment yet: %s", error)
        time.sleep(min(RETRY_S, 0.5 * 2.0 ** min(tries, 10)) * random.uniform(0.7, 1.0))


def run(assignment: Assignment, wire: Wire) -> dict[str, Any]:
    """The attempt, from its number in the run directory to its last event."""
    run_dir = Path(assignment.run_dir)
    begin_attempt(run_dir, assignment.attempt)
    os.environ.update(assignment.secrets)
    _log_to(run_dir / "logs" / "driver.log", tuple(assignment.secrets.values()))
    orders = StandingOrders(assignment.orders)
    link = Link(wire, orders)
    with hold_within(run_dir, PREDECESSOR_S):
        try:
            spec, changes = _job(assignment, run_dir)
            from sapo_ray.driver import run as runs  # engines; only once it is known that they are wanted
        except (SapoRayError, ImportError) as error:
            _fail(run_dir, assignment, link, f"{type(error).__name__}: {error}")
            raise
        by = runs.Assigned(attempt=assignment.attempt, orders=orders, link=link)
        result = runs.assigned(spec, run_dir, changes, by)
    if orders.unwanted is not None and result["status"] == "paused":
        raise orders.unwanted
    return result


def _job(assignment: Assignment, run_dir: Path) -> tuple[JobSpec, list[str]]:
    """The job as this attempt runs it, and the keys that differ from the attempt before.

    Raises:
        ConfigError: the job is wrong, or differs from what the run was begun with in what a resume may not change.
    """
    orders = assignment.orders
    workers = {"workers": orders.rollout_workers, "min_workers": orders.rollout_min, "max_workers": orders.rollout_max}
    overrides = [f"rollout.{key}={value}" for key, value in workers.items() if value is not None]
    spec = resolve(assignment.spec, overrides, source=assignment.job_id)
    spec = spec.model_copy(update={"run_dir": str(run_dir)})
    if not (run_dir / "spec.json").exists():
        return spec, []
    before = resolve(read_stored(run_dir), source="stored job")
    spec = spec.model_copy(update={"name": before.name})  # a job may be renamed; its run is not another for that
    return spec, check_resume(before, spec)


def _fail(run_dir: Path, assignment: Assignment, link: Link, reason: str) -> None:
    """An attempt that cannot even begin says so where all others do."""
    secrets = hidden(assignment.secrets.values())
    journal = Journal(run_dir / "journal.jsonl", assignment.attempt, link.hear, secrets)
    try:
        link.open(journal)
        journal.event("transition", state="failed", reason=reason)
        link.close()
    finally:
        journal.close()


def _log_to(path: Path, secrets: Sequence[str]) -> None:
    """The driver's lines beside those of its actors; Ray keeps the driver's output as well. Without secrets, both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger().addHandler(logging.FileHandler(path))
    formatter = MaskingFormatter(LINE, hidden(secrets))
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sapo_ray.driver.main", description="One attempt of one job.")
    parser.add_argument("--job", required=True, metavar="ID")
    parser.add_argument("--attempt", required=True, type=int, metavar="N")
    parser.add_argument("--control", required=True, metavar="URL", help="the control plane, as this machine reaches it")
    parser.add_argument("--token-file", required=True, type=Path, metavar="FILE", help="holds the attempt's token")
    return parser.parse_args(arguments)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def _say(code: int, error: BaseException) -> int:
    log.error("%s: %s", type(error).__name__, error)
    return code


if __name__ == "__main__":
    sys.exit(main())
