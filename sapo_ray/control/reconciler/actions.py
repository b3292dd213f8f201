"""What the reconciler can do to one job. Decided by pure functions, done by `acting.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Settled = Literal["recovering", "paused", "cancelled", "queued"] | None
"""Where a job goes whose driver is gone; None: it stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """Nothing to do now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """Replace a driver that is gone: a new attempt, which costs one of the job's restarts."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit:
    """Hand the attempt to the cluster and note that it was launched; harmless if it was handed over before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewToken:
    """The attempt was never submitted and its token is lost: give it another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoteLaunched:
    """The cluster has the submission already: only the note is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Ask the cluster to end the driver."""

    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Recover:
    """The driver counts as lost: say so; it is stopped next, if it should still run."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Settle:
    """The driver is gone for certain: take the rest of its journal, clean up, end the attempt.

    `then` is the job's new state, unless the journal says that the driver came to an end of its own.
    """

    then: Settled
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """No driver is left and none is wanted: the job's last word."""

    state: Literal["failed", "paused", "cancelled", "recovering", "queued"]
    reason: str


Action = Wait | Begin | Submit | NewToken | NoteLaunched | Stop | Recover | Settle | Finish
"""Exactly one at a time; after each the job is looked at again."""
