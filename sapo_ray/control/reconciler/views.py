"""What the decisions are made on: plain copies of rows, so that a decision needs no database."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sapo_ray.api.jobs import LIVE, TERMINAL
from sapo_ray.control.launcher import LaunchStatus

AttemptState = Literal["launching", "launched", "ended"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """A job as the store has it. Times are Unix seconds."""

    id: str
    tenant: str
    state: str
    reason: str
    since: float
    desired: str
    """run, pause, cancel: what the user asked for last."""
    discard: bool
    restarts: int
    run_dir: Path
    held: bool = False
    """Its driver waits for room on a full disk."""

    @property
    def live(self) -> bool:
        """Whether it counts as running."""
        return self.state in LIVE

    @property
    def wants_driver(self) -> bool:
        """Whether a driver that has not been started yet should be."""
        return self.state in ("starting", "running", "recovering")

    @property
    def over(self) -> bool:
        """Whether it will not change any more."""
        return self.state in TERMINAL


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptView:
    """The newest attempt of a job."""

    number: int
    submission_id: str
    state: AttemptState
    created_at: float
    launched_at: float | None
    last_heard: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Everything a decision about one job depends on."""

    job: JobView
    attempt: AttemptView | None
    """The newest, if it has not ended."""
    launch: LaunchStatus
    """What the cluster says of that attempt."""
    token_kept: bool
    """Whether the attempt's token lies where the driver will look for it."""
    now: float
    watching_since: float
    """Start of this control plane: before it nobody could be heard."""

    @property
    def silence(self) -> float:
        """Seconds without a sign of the driver that somebody could have heard."""
        attempt = self.attempt
        assert attempt is not None
        heard = max(attempt.last_heard or 0.0, attempt.launched_at or attempt.created_at, self.watching_since)
        return self.now - heard

    @property
    def in_state(self) -> float:
        """Seconds in the present state that this control plane could have done something about."""
        return self.now - max(self.job.since, self.watching_since)
