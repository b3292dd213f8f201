"""What is the matter with a job."""

from __future__ import annotations

import time
from pathlib import Path as FilePath
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

from sapo_ray.api.diagnosis import Diagnosis
from sapo_ray.control.access import Reader
from sapo_ray.control.documents import keyed
from sapo_ray.control.files import open_below
from sapo_ray.control.logs import hide
from sapo_ray.control.problems import Refused
from sapo_ray.control.service import JobId, The, find, respond
from sapo_ray.control.store import EventRow, JobRow, events, jobs
from sapo_ray.diagnosis import Evidence, diagnose
from sapo_ray.diagnosis.log_lines import TAIL_BYTES, telling
from sapo_ray.diagnosis.run_dir import free_bytes
from sapo_ray.diagnosis.vitals import FILE, parse

router = APIRouter(prefix="/v1/jobs", tags=["watch"])

KINDS = ("transition", "condition", "worker", "step", "rollback")
MOST_EVENTS = 500
"""Newest events of these kinds that are looked through."""
_EXAMPLES = {
    "stalled": {
        "value": {
            "verdict": "stalled",
            "component": "rollout-0",
            "summary": "rollout-0: no progress for 41 s where 2.3 s is usual: sampling 64 completions",
            "since": "2026-11-23T10:15:00Z",
            "remedy": "look at its log and its machine; it is replaced by itself once it misses its heartbeat",
            "cause": {
                "code": "silent",
                "component": "rollout-0",
                "text": "no progress for 41 s where 2.3 s is usual: sampling 64 completions",
                "time": "2026-11-23T10:15:00Z",
                "log": "rollout-0.log",
                "lines": ["INFO 11-23 10:14:58 engine is ready"],
            },
            "components": [
                {
                    "name": "rollout-0",
                    "task": "sampling 64 completions",
                    "since": "2026-11-23T10:14:50Z",
                    "quiet_s": 41.0,
                    "usual_s": 2.3,
                    "stalled": True,
                }
            ],
            "notes": [],
        }
    },
    "failed": {
        "value": {
            "verdict": "failed",
            "component": "rollout-0",
            "summary": "failed, step 12 of 60; it began with rollout-0: rollout-0 died (sample group a:17:0)",
            "since": "2026-11-23T10:15:00Z",
            "remedy": "give the part more memory, or ask for less: fewer rollout.max_num_seqs",
            "cause": {
                "code": "out_of_memory",
                "component": "rollout-0",
                "text": "rollout-0 died (sample group a:17:0): the actor died",
                "time": "2026-11-23T10:14:10Z",
                "log": "rollout-0.log",
                "lines": ["torch.OutOfMemoryError: CUDA out of memory."],
            },
            "components": [],
            "notes": [],
        }
    },
}


@router.get(
    "/{job_id:segment}/diagnosis",
    operation_id="diagnose_job",
    summary="What is the matter with a job",
    response_model=Diagnosis,
    responses={
        200: {"description": "The verdict, and why.", "content": {"application/json": {"examples": _EXAMPLES}}},
        **keyed(404),
    },
)
def diagnose_job(caller: Reader, control: The, job_id: JobId) -> Response:
    """Which part does not get on or brought the job down, since when, its own last words, and what to do.

    Made of the job's events, of what its driver writes down every few seconds, and of its logs: it needs no driver.
    """
    with control.store.read() as session:
        known = known_of(session, find(session, caller, job_id), time.time())
    return respond(diagnose(known))


def known_of(session: Session, row: JobRow, now: float) -> Evidence:
    """What the store and the run directory tell of a job."""
    run_dir = FilePath(row.run_dir)
    newest = events.newest_events(session, row.id, KINDS, MOST_EVENTS)
    return Evidence(
        now=now,
        state=row.state,
        reason=row.reason,
        since=row.since,
        attempt=row.attempt,
        step=row.step,
        steps=row.steps,
        conditions=[dict(one) for one in row.conditions],
        events=[_event(event) for event in reversed(newest)],
        vitals=parse(_tail(run_dir, FILE, 1 << 20)),
        log=lambda name: [str(hide(line)) for line in telling(_tail(run_dir / "logs", name, TAIL_BYTES))],
        position=jobs.queue_position(session, row) if row.state == "queued" else None,
        last_heard=row.last_heard,
        free=free_bytes(run_dir),
        served=True,
    )


def _event(row: EventRow) -> dict[str, Any]:
    """As the journal has it."""
    return {**row.data, "time": row.time, "attempt": row.attempt, "kind": row.kind}


def _tail(folder: FilePath, name: str, size: int) -> bytes:
    """The last bytes of a file of the run; none of one that is not there."""
    try:
        with open_below(folder, name) as file:
            file.seek(max(0, file.seek(0, 2) - size))
            return file.read(size)
    except (Refused, OSError):  # what cannot be read tells nothing; the rest of the diagnosis is worth having
        return b""
