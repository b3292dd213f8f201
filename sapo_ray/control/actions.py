"""What users may ask of a job in which state. Decided here, as a pure function; routes carry it out.

| state             | pause   | resume | cancel     | checkpoint |
|-------------------|---------|--------|------------|------------|
| queued            | paused  | -      | cancelled  | 409        |
| starting          | pausing | 409    | cancelling | 409        |
| running           | pausing | 409    | cancelling | asked for  |
| recovering        | pausing | 409    | cancelling | 409        |
| pausing           | -       | 409    | cancelling | -          |
| paused            | -       | queued | cancelled  | 409        |
| cancelling        | 409     | 409    | -          | 409        |
| cancelled         | 409     | 409    | -          | 409        |
| succeeded, failed | 409     | 409    | 409        | 409        |

`-`: it is so already, and the request is granted without a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sapo_ray.control.problems import illegal

Action = Literal["pause", "resume", "cancel", "checkpoint"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What an action does to a job."""

    state: str | None = None
    """New state, if it changes at once."""
    desired: Literal["run", "pause", "cancel"] | None = None
    """New desired state."""
    reason: str = ""
    checkpoint: bool = False
    """Ask the driver for a checkpoint."""

    @property
    def nothing(self) -> bool:
        """Whether the job is as it was asked to be."""
        return self.desired is None and not self.checkpoint


_ACTIVE = frozenset({"starting", "running", "recovering"})
_NOTHING = Change()


def decide(action: Action, state: str) -> Change:
    """What `action` changes on a job in `state`. Raises Refused (409) where it is not permitted."""
    change = {"pause": _pause, "resume": _resume, "cancel": _cancel, "checkpoint": _checkpoint}[action](state)
    if change is None:
        raise illegal(state, f":{action}", _hint(action, state))
    return change


def _pause(state: str) -> Change | None:
    if state == "queued":
        return Change(state="paused", desired="pause", reason="paused by the user before it was launched")
    if state in _ACTIVE:
        return Change(state="pausing", desired="pause", reason="the user asked for a pause")
    return _NOTHING if state in ("pausing", "paused") else None


def _resume(state: str) -> Change | None:
    if state == "paused":
        return Change(state="queued", desired="run", reason="resumed by the user")
    return _NOTHING if state == "queued" else None


def _cancel(state: str) -> Change | None:
    if state in ("queued", "paused"):
        return Change(state="cancelled", desired="cancel", reason=f"cancelled by the user while {state}")
    if state in _ACTIVE or state == "pausing":
        return Change(state="cancelling", desired="cancel", reason="the user asked to cancel")
    return _NOTHING if state in ("cancelling", "cancelled") else None


def _checkpoint(state: str) -> Change | None:
    if state == "running":
        return Change(checkpoint=True)
    return _NOTHING if state == "pausing" else None


def _hint(action: Action, state: str) -> str:
    if state in ("succeeded", "failed", "cancelled"):
        return "it has ended; submit a new job"
    if state == "cancelling":
        return "it is ending; wait for `cancelled`"
    if action == "resume":
        return "wait for `paused`" if state == "pausing" else "it runs already"
    return "wait until it is running"
