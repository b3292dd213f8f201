"""What to do with one job now: a pure function of what was seen.

    queued ----admission----> starting -> running -> (driver's own end)
                                 |           |
                                 +-----------+--> recovering -> starting, or failed when the budget is spent
    pausing -> paused,  cancelling -> cancelled: by the driver, or after its time is up by the reconciler

A job without a driver is asked what it wants next; a job with one, whether the driver is as it should be.
"""

from __future__ import annotations

from sapo_ray.control.reconciler.actions import Action, Finish, Wait
from sapo_ray.control.reconciler.ending import decide_ended, decide_ending, decide_nothing_left
from sapo_ray.control.reconciler.launching import decide_launching
from sapo_ray.control.reconciler.limits import Limits
from sapo_ray.control.reconciler.views import Seen
from sapo_ray.control.reconciler.watching import decide_recovering, decide_restart, decide_running


def decide(seen: Seen, limits: Limits) -> Action:
    """The next action for a job; queued jobs without a driver are admission's."""
    job, attempt = seen.job, seen.attempt
    if attempt is None:
        if job.state == "paused" and job.desired == "run":
            return Finish(state="queued", reason="the pause was withdrawn while the driver obeyed it")
        if not job.live:
            return Wait()
        return decide_restart(seen, limits) if job.state == "recovering" else decide_nothing_left(seen)
    if attempt.state == "launching":
        return decide_launching(seen)
    if job.state in ("starting", "running"):
        return decide_running(seen, limits)
    if job.state == "recovering":
        return decide_recovering(seen, limits)
    if job.state in ("pausing", "cancelling"):
        return decide_ending(seen, limits)
    return decide_ended(seen, limits)
