"""A job with a driver that should go on. Pure.

Three things tell that a driver is gone: the cluster says so, the cluster has never heard of it (it was replaced), or
nothing was heard for too long. The last is a guess, so the driver is stopped before another is started.
"""

from __future__ import annotations

from sapo_ray.control.reconciler.actions import Action, Begin, Finish, Recover, Settle, Stop, Wait
from sapo_ray.control.reconciler.limits import Limits
from sapo_ray.control.reconciler.views import Seen


def decide_running(seen: Seen, limits: Limits) -> Action:
    """starting or running, with an attempt that was launched."""
    if gone(seen, limits):
        return Settle(then="recovering", reason=_last_words(seen))
    if lost := _lost(seen, limits):
        return Recover(reason=lost)
    return Wait()


def decide_recovering(seen: Seen, limits: Limits) -> Action:
    """recovering, and the old driver may still be there."""
    if gone(seen, limits):
        return Settle(then=None, reason=_last_words(seen))
    if lost := _lost(seen, limits):
        return Stop(why=lost)
    if seen.in_state > limits.exit_grace_s:
        return Stop(why=f"the driver reported its end and still runs {limits.exit_grace_s:.0f} s later")
    return Wait()


def decide_restart(seen: Seen, limits: Limits) -> Action:
    """recovering, and no driver is left."""
    job = seen.job
    if job.desired == "pause":
        return Finish(state="paused", reason=f"paused; the driver had ended before: {job.reason}")
    if job.desired == "cancel":
        return Finish(state="cancelled", reason=f"cancelled; the driver had ended before: {job.reason}")
    if job.restarts >= limits.restarts:
        return Finish(
            state="failed",
            reason=f"the driver was replaced {job.restarts} times (the most allowed) and ended again: {job.reason}",
        )
    if seen.now - job.since < limits.retry_delay(job.restarts):
        return Wait()
    return Begin(reason=f"restart {job.restarts + 1} of {limits.restarts}: {job.reason}")


def gone(seen: Seen, limits: Limits) -> bool:
    """Whether nothing of the driver runs any more, for certain."""
    if seen.launch.state == "UNKNOWN":
        # A driver that outlives its cluster for a moment may still report; it is left to do so.
        return seen.silence > limits.forgotten_grace_s
    return seen.launch.over


def _lost(seen: Seen, limits: Limits) -> str | None:
    """Why the driver counts as lost, or None."""
    attempt = seen.attempt
    assert attempt is not None
    if attempt.last_heard is None:
        if seen.silence > limits.start_deadline_s:
            return (
                f"attempt {attempt.number} has not reported within {limits.start_deadline_s:.0f} s of its launch "
                f"(Ray says {seen.launch.state})"
            )
        return None
    if seen.silence > limits.heartbeat_timeout_s:
        return (
            f"nothing heard of attempt {attempt.number} for {limits.heartbeat_timeout_s:.0f} s "
            f"(Ray says {seen.launch.state})"
        )
    return None


def _last_words(seen: Seen) -> str:
    attempt, launch = seen.attempt, seen.launch
    assert attempt is not None
    head = f"attempt {attempt.number} ended without saying why (Ray says {launch.state})"
    return f"{head}: {launch.message}" if launch.message else head
