"""A job whose driver should end, or has said that it did. Pure.

The driver is given time to obey; then it is stopped, and the reconciler finishes what was asked for.
"""

from __future__ import annotations

from typing import Literal

from sapo_ray.control.reconciler.actions import Action, Finish, Settle, Stop, Wait
from sapo_ray.control.reconciler.limits import Limits
from sapo_ray.control.reconciler.views import JobView, Seen
from sapo_ray.control.reconciler.watching import gone


def decide_ending(seen: Seen, limits: Limits) -> Action:
    """pausing or cancelling, with an attempt that was launched."""
    job = seen.job
    if gone(seen, limits):
        return Settle(then=settled_state(job), reason=f"{_asked(job)}; the driver ended before it could say so")
    if seen.silence > limits.heartbeat_timeout_s:
        return Stop(why=f"{_asked(job)}, and nothing was heard of the driver for {limits.heartbeat_timeout_s:.0f} s")
    grace = _grace(job, limits)
    if job.state == "pausing" and job.held:
        return Wait()  # its time begins when there is room for the checkpoint: stopped now, its steps would be lost
    if seen.in_state > grace:
        return Stop(why=f"{_asked(job)}, and the driver has not obeyed within {grace:.0f} s")
    return Wait()


def decide_ended(seen: Seen, limits: Limits) -> Action:
    """The job needs no driver (over, paused, queued again) and the last one may still be on its way out."""
    if gone(seen, limits):
        return Settle(then=None, reason=f"the job is {seen.job.state}")
    if seen.in_state > limits.exit_grace_s:
        return Stop(why=f"the job is {seen.job.state} and its driver still runs {limits.exit_grace_s:.0f} s later")
    return Wait()


def decide_nothing_left(seen: Seen) -> Action:
    """A live job without a driver: what was asked for is done, or something ended the driver behind our back."""
    job = seen.job
    if job.state == "pausing":
        return Finish(state="paused", reason="paused; no driver was running")
    if job.state == "cancelling":
        return Finish(state="cancelled", reason="cancelled; no driver was running")
    return Finish(state="recovering", reason=f"the job was {job.state} without a driver")


def settled_state(job: JobView) -> Literal["paused", "cancelled"] | None:
    """Where a job goes that asked for its driver's end."""
    if job.state == "pausing":
        return "paused"
    return "cancelled" if job.state == "cancelling" else None


def _grace(job: JobView, limits: Limits) -> float:
    if job.state == "pausing":
        return limits.pause_grace_s
    return limits.discard_grace_s if job.discard else limits.cancel_grace_s


def _asked(job: JobView) -> str:
    return "the job was to be paused" if job.state == "pausing" else "the job was to be cancelled"
