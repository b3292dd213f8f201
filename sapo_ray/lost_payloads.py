"""Whether an error of Ray says that finished samples went with the node that held them.

Payloads of a few thousand tokens lie in the object store of the node that sampled them. When it dies they cannot be had
again: the groups that they belong to are collected anew.
"""

from __future__ import annotations

from ray.exceptions import ObjectLostError, RayTaskError


def payload_lost(error: BaseException | None) -> bool:
    """Of a call that was given payloads, or of a reference to one."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return isinstance(cause, ObjectLostError)
