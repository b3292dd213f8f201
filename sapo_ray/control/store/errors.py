"""What the store refuses, and how it says that it cannot answer.

SapoRayError
`-- StoreError
    |-- StoreUnavailable     the database is gone, busy, full or not migrated: try again later
    |-- IllegalTransition    a job in this state cannot be brought into that one
    |-- DriverExiting        a job that has ended, but whose last driver may still write its files: try again soon
    |-- Superseded           events of an attempt that is not the job's newest
    |-- SequenceGap          events that do not follow what is stored
    |-- BadBatch             a delivery that contradicts itself
    |-- LeaseLost            somebody else looks after the job now
    |-- KeyInFlight          a request with this idempotency key is under way
    |-- KeyReused            an idempotency key came with another request
    |-- BadCursor            a page was asked for after something that is no cursor
    `-- SchemaTooNew         the database was migrated by a newer version than this one
"""

from __future__ import annotations

from collections.abc import Collection

from sapo_ray.errors import SapoRayError


class StoreError(SapoRayError):
    """Base of the store's errors."""


class StoreUnavailable(StoreError):
    """The database cannot answer now. Nothing was written, unless the answer to a commit was what got lost."""

    retry_after_s = 5
    """When it is worth trying again."""


class IllegalTransition(StoreError):
    """The job's state does not allow what was asked."""

    def __init__(self, current: str, wanted: str = "", allowed: Collection[str] = ()) -> None:
        super().__init__(current, wanted, tuple(allowed))
        self.current = current
        self.wanted = wanted
        self.allowed = tuple(sorted(allowed))

    def __str__(self) -> str:
        return f"the job is {self.current}; to become {self.wanted} it must be {' or '.join(self.allowed) or 'another'}"


class DriverExiting(StoreError):
    """The job has ended and its last driver has not yet: what it writes would outlive the job."""

    retry_after_s = 3
    """When it is worth trying again."""

    def __init__(self, current: str) -> None:
        super().__init__(f"the job is {current}, and its driver is still exiting")
        self.current = current


class Superseded(StoreError):
    """The attempt is not the job's newest: its driver must end at once."""

    def __init__(self, current_attempt: int) -> None:
        super().__init__(current_attempt)
        self.current_attempt = current_attempt

    def __str__(self) -> str:
        return f"the job's newest attempt is {self.current_attempt}"


class SequenceGap(StoreError):
    """Events before these are missing: the driver goes back to `expected`."""

    def __init__(self, expected: int) -> None:
        super().__init__(expected)
        self.expected = expected

    def __str__(self) -> str:
        return f"the next event must have sequence number {self.expected}"


class BadBatch(StoreError, ValueError):
    """A delivery whose events are not numbered as it says."""


class LeaseLost(StoreError):
    """Another holder looks after the job: nothing more may be written under this lease."""


class KeyInFlight(StoreError):
    """The first request with this idempotency key has not been answered yet."""


class KeyReused(StoreError):
    """This idempotency key belongs to another request."""


class BadCursor(StoreError, ValueError):
    """`after` is not what a page gave as its `next`."""


class SchemaTooNew(StoreError):
    """The database was migrated by a newer version of sapo-ray."""
