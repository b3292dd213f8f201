"""The job store. Functions take a session of `Store.begin()` (to write) or `Store.read()` first.

Locks are taken in this order, so that no two transactions wait for each other: idempotency key, lease, job, attempt.
"""

from sapo_ray.control.store import attempts, datasets, events, idempotency, jobs, keys, leases
from sapo_ray.control.store.engine import Store
from sapo_ray.control.store.errors import (
    BadBatch,
    BadCursor,
    DriverExiting,
    IllegalTransition,
    KeyInFlight,
    KeyReused,
    LeaseLost,
    SchemaTooNew,
    SequenceGap,
    StoreError,
    StoreUnavailable,
    Superseded,
)
from sapo_ray.control.store.events import IngestReply
from sapo_ray.control.store.idempotency import Replay
from sapo_ray.control.store.leases import Lease
from sapo_ray.control.store.tables import (
    AttemptRow,
    DatasetRow,
    EventRow,
    IdempotencyRow,
    JobRow,
    KeyRow,
    LeaseRow,
)

__all__ = [
    "AttemptRow",
    "BadBatch",
    "BadCursor",
    "DatasetRow",
    "DriverExiting",
    "EventRow",
    "IdempotencyRow",
    "IllegalTransition",
    "IngestReply",
    "JobRow",
    "KeyInFlight",
    "KeyReused",
    "KeyRow",
    "Lease",
    "LeaseLost",
    "LeaseRow",
    "Replay",
    "SchemaTooNew",
    "SequenceGap",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "Superseded",
    "attempts",
    "datasets",
    "events",
    "idempotency",
    "jobs",
    "keys",
    "leases",
]
