"""One attempt of a run from its job to its result, in the journal whatever happens; stages.py has what it does.

`train` and `resume` are what the command line calls, `assigned` what a control plane starts (main.py).
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from sapo_ray.config.load import resume_job
from sapo_ray.config.packages import check_secrets
from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.attempt import Attempt
from sapo_ray.driver.hold import DiskHold
from sapo_ray.driver.interrupts import Interrupts
from sapo_ray.driver.journal import Journal, Listener
from sapo_ray.driver.link import Link
from sapo_ray.driver.masking import hidden_of
from sapo_ray.driver.orders import Ended, StandingOrders
from sapo_ray.driver.pulse import pulse_of
from sapo_ray.driver.result import Result, finished_steps, reason, summary
from sapo_ray.driver.rundir import hold, new_run_dir, next_attempt, read_stored, write_spec
from sapo_ray.driver.stages import train_and_export
from sapo_ray.errors import ConfigError, DeadlineExceeded, NoRoom, ResourceError, Superseded, WorkerLost

log = logging.getLogger(__name__)

RECOVERABLE = (WorkerLost, DeadlineExceeded, RayError)
"""Ends of an attempt that another one from the newest checkpoint may outlive; a control plane decides whether.

NoRoom is one, too, where there was room before: a lost node may take longer to come back than an attempt waits.
"""


def train(spec: JobSpec, listener: Listener | None = None) -> dict[str, Any]:
    """Run a new job to its end; returns what result.json holds. Raises SapoRayError for what the user can mend."""
    check_secrets(spec)
    return _attempt(spec, new_run_dir(spec), listener)


def resume(run_dir: Path, overrides: list[str], listener: Listener | None = None) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint, or from the start if it has none."""
    spec, changes = resume_job(read_stored(run_dir), overrides)
    check_secrets(spec)
    finished = finished_steps(run_dir)
    if finished is not None and spec.steps <= finished:
        raise ConfigError(
            f"{run_dir} has taken all its {finished} steps and succeeded; "
            f"to train on, --set steps=N with N > {finished}"
        )
    return _attempt(spec, run_dir.absolute(), listener, changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """What a control plane gives an attempt beside its job."""

    attempt: int
    orders: StandingOrders
    link: Link


def assigned(spec: JobSpec, run_dir: Path, changes: Sequence[str], by: Assigned) -> dict[str, Any]:
    """One attempt under a control plane, by the process that holds the run. Goes on from the newest checkpoint."""
    spec = spec.model_copy(update={"run_dir": str(run_dir)})
    write_spec(run_dir, spec)
    with Interrupts().heard() as interrupts:
        return _journalled(spec, run_dir, by.link.hear, changes, by, interrupts)


def _attempt(spec: JobSpec, run_dir: Path, listener: Listener | None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """One attempt, by the only process that writes to the run."""
    spec = spec.model_copy(update={"run_dir": str(run_dir)})
    with hold(run_dir), Interrupts().heard() as interrupts:
        write_spec(run_dir, spec)
        return _journalled(spec, run_dir, listener, changes, None, interrupts)


def _journalled(
    spec: JobSpec,
    run_dir: Path,
    listener: Listener | None,
    changes: Sequence[str],
    by: Assigned | None,
    interrupts: Interrupts,
) -> dict[str, Any]:
    """One attempt, in the journal from its first moment to its last."""
    number = next_attempt(run_dir) if by is None else by.attempt
    journal = Journal(run_dir / "journal.jsonl", number, listener, hidden_of(spec))
    result = Result(spec, run_dir, journal, told=by is not None)
    orders = StandingOrders() if by is None else by.orders
    try:
        if by is not None:
            by.link.open(journal)
        result.begin(changes)
        with pulse_of(spec, journal, None if by is None else by.link.activity) as pulse:
            attempt = Attempt(
                spec=spec,
                number=number,
                run_dir=run_dir,
                journal=journal,
                orders=orders,
                hold=DiskHold(run_dir, journal, orders),
                pulse=pulse,
            )
            outcome = train_and_export(attempt, interrupts)
    except Ended as order:
        result.end(order.state, f"{order.state} while the job was starting; nothing was trained by this attempt")
    except Superseded as error:
        journal.fence(error)
        raise
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupts.ending()
        result.end("interrupted", "interrupted by the user" if by is None else "the driver was told to end")
        raise
    except BaseException as error:
        again = by is not None and (isinstance(error, RECOVERABLE) or (number > 1 and isinstance(error, NoRoom)))
        result.end("interrupted" if again else "failed", f"{type(error).__name__}: {error}")
        raise
    else:
        result.end(outcome.ending or "succeeded", reason(outcome), summary(outcome))
    finally:
        _close(journal, by)
    return result.values


def _close(journal: Journal, by: Assigned | None) -> None:
    """What failed first stays the error."""
    first = sys.exc_info()[1]
    try:
        if by is not None:
            by.link.close()
    finally:
        try:
            journal.close()
        except ResourceError as error:
            if first is None:
                raise
            log.error("%s", error)
