"""From an attempt in the store to a driver in the cluster. Pure.

The token is written before the submission, the submission happens before the note. So an attempt without a note may or
may not run; the cluster knows, and a second submission of its id is not a second driver. An attempt that was heard of
ran: if the cluster does not know it, that is another cluster now, and this attempt is not to be started once more.
"""

from __future__ import annotations

from sapo_ray.control.reconciler.actions import Action, NewToken, NoteLaunched, Settle, Submit
from sapo_ray.control.reconciler.ending import settled_state
from sapo_ray.control.reconciler.views import Seen


def decide_launching(seen: Seen) -> Action:
    """What to do with an attempt that has no note of its launch."""
    attempt = seen.attempt
    assert attempt is not None
    if seen.launch.state != "UNKNOWN" or attempt.last_heard is not None:
        return NoteLaunched()
    if not seen.job.wants_driver:
        return Settle(then=settled_state(seen.job), reason="no driver was started")
    return Submit() if seen.token_kept else NewToken()
