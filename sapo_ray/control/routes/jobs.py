"""Jobs: submit, list, look, change, remove."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import Field
from sqlalchemy.orm import Session

from sapo_ray.api.jobs import Job, Labels, Scale, State, Whole, Wire
from sapo_ray.config.sections import RolloutSpec
from sapo_ray.control import body, quotas, specs, views
from sapo_ray.control.access import Reader, Submitter
from sapo_ray.control.documents import ETAG, MADE, changing, json_body, keyed
from sapo_ray.control.service import (
    Answer,
    IdempotencyKey,
    IfMatch,
    JobId,
    The,
    find,
    give,
    job_answer,
    once,
    peek,
    respond,
)
from sapo_ray.control.store import jobs

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

Priority = Annotated[Whole, Field(ge=0, le=100)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Submission(Wire):
    """A job to be run."""

    spec: Annotated[dict[str, Any], Field(json_schema_extra={"x-schema": "JobSpecInput"})]
    """The job, as in a job file; `preset` may carry most of it. `run_dir` is chosen by the service."""
    priority: Priority = 50
    """0 to 100; higher is launched first."""
    labels: Labels = Field(default_factory=dict)
    """The user's own marks, for finding jobs again."""


class JobChange(Wire):
    """What may be changed of a job; what is not given stays."""

    priority: Priority = Field(default_factory=lambda: 50)
    """New priority; counts while the job is queued."""
    labels: Labels = Field(default_factory=dict)
    """All new labels; they replace the old ones."""
    name: Name = Field(default_factory=lambda: "job")
    """New name; the spec keeps its own."""


_SUBMISSIONS = {
    "quickstart": {"spec": {"preset": "quickstart"}},
    "with changes": {
        "spec": {"preset": "quickstart", "name": "longer", "steps": 120, "rollout": {"workers": 2}},
        "priority": 70,
        "labels": {"team": "maths"},
    },
}


@router.post(
    "",
    operation_id="submit_job",
    summary="Submit a job",
    status_code=201,
    response_model=Job,
    responses={
        201: {"description": "The job, queued.", "headers": MADE},
        200: {"description": "Dry run: the job is valid; nothing was made.", "model": views.Checked},
        **changing(409),
    },
    openapi_extra=json_body(Submission, _SUBMISSIONS),
)
def submit(
    caller: Submitter,
    control: The,
    submission: Annotated[Submission, Depends(body.body_of(Submission))],
    key: IdempotencyKey,
    dry_run: Annotated[bool, Query(description="Only check the job, and show what it resolves to.")] = False,
) -> Response:
    """Check a job and put it into the queue. Every problem of the spec is reported at once."""
    if dry_run:
        spec = specs.checked(control, caller, submission.spec)
        checked = views.Checked(spec=spec.model_dump(mode="json"), scale=_scale(spec.rollout))
        return respond(checked)
    found: list[Any] = []

    def prepare() -> None:
        found.append(specs.checked(control, caller, submission.spec))

    def work(session: Session) -> Answer:
        quotas.check_queue(session, caller.tenant, control.settings)
        spec = found[0]
        specs.hold_datasets(session, caller.tenant, spec)
        scale = _scale(spec.rollout)
        row = jobs.create_job(
            session,
            tenant=caller.tenant,
            name=spec.name,
            spec=spec.model_dump(mode="json"),
            steps=spec.steps,
            priority=submission.priority,
            labels=submission.labels,
            scale=(scale.min, scale.max, scale.target),
            runs_root=control.settings.runs_dir,
        )
        return job_answer(session, row, 201)

    return once(control, caller, key, ("POST", "/v1/jobs", submission.model_dump(mode="json")), work, prepare)


def _scale(rollout: RolloutSpec) -> Scale:
    """What a job begins with."""
    return Scale(min=rollout.min_workers, max=rollout.most_workers, target=rollout.workers)


@router.get(
    "",
    operation_id="list_jobs",
    summary="List jobs",
    response_model=views.JobPage,
    responses=keyed(400),
)
def list_jobs(
    caller: Reader,
    control: The,
    state: Annotated[
        list[State] | None, Query(description="Only jobs in this state; may be given several times.")
    ] = None,
    label: Annotated[
        str | None,
        Query(description="Only jobs with this label, `key` or `key=value`.", pattern="^[^=]", examples=["team=maths"]),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="Most jobs of a page.")] = 50,
    after: Annotated[str | None, Query(description="`next` of the page before.")] = None,
) -> Response:
    """The tenant's jobs, newest first. Deep pages cost what the first one costs."""
    pair = None
    if label is not None:
        name, equals, value = label.partition("=")
        pair = (name, value if equals else None)
    with control.store.read() as session:
        rows = jobs.list_jobs(session, caller.tenant, state=state, label=pair, after=after, limit=limit + 1)
        more, rows = len(rows) > limit, rows[:limit]
        positions = jobs.queue_positions(session, rows)
        data = [views.job(row, positions.get(row.id)) for row in rows]
    return respond(views.JobPage(data=data, has_more=more, next=rows[-1].id if more else None))


@router.get(
    "/{job_id:segment}",
    operation_id="get_job",
    summary="One job",
    response_model=Job,
    responses={200: {"description": "The job.", "headers": ETAG}, **keyed(404)},
)
def get_job(caller: Reader, control: The, job_id: JobId) -> Response:
    """What was asked of the job beside what was observed of it."""
    with control.store.read() as session:
        return give(job_answer(session, find(session, caller, job_id), 200))


@router.patch(
    "/{job_id:segment}",
    operation_id="change_job",
    summary="Change priority, labels or name",
    response_model=Job,
    responses={200: {"description": "The job as it is now.", "headers": ETAG}, **changing(404, 412)},
    openapi_extra=json_body(JobChange, {"sooner": {"priority": 90}, "labels": {"labels": {"team": "maths"}}}),
)
def change_job(
    caller: Submitter,
    control: The,
    job_id: JobId,
    change: Annotated[JobChange, Depends(body.body_of(JobChange))],
    expected: IfMatch,
) -> Response:
    """What is not given stays as it is."""
    with control.store.begin() as session:
        row = find(session, caller, job_id, lock=True)
        body.check_match(expected, row.generation)
        given = change.model_fields_set
        if given:
            for field in given:
                setattr(row, field, getattr(change, field))
            jobs.bump(row)
            session.flush()
        return give(job_answer(session, row, 200))


@router.delete(
    "/{job_id:segment}",
    operation_id="delete_job",
    summary="Remove a job that has ended, with its files",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "It is gone."}, **keyed(404, 409, 412)},
)
def delete_job(caller: Submitter, control: The, job_id: JobId, expected: IfMatch) -> Response:
    """Cancel a job first if it has not ended. Events, checkpoints, export and logs go too, for good."""
    trash = control.settings.trash_dir / job_id
    with control.store.begin() as session:
        row = find(session, caller, job_id, lock=True)
        body.check_match(expected, row.generation)
        run_dir = Path(row.run_dir)
        jobs.delete_job(session, row)
        # Out of the way first: were the row gone before the files, a crash in between would leave them for good.
        moved = _move(run_dir, trash)
        try:
            session.commit()
        except BaseException:
            if moved:
                trash.rename(run_dir)
            raise
    shutil.rmtree(trash, ignore_errors=True)
    return Response(status_code=204)


def _move(run_dir: Path, trash: Path) -> bool:
    trash.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    try:
        run_dir.rename(trash)
    except FileNotFoundError:
        return False  # it never began
    return True


@router.get(
    "/{job_id:segment}/config",
    operation_id="get_job_config",
    summary="The resolved job",
    responses={
        200: {
            "description": "Every key of the job; with `Accept: application/yaml` as a job file.",
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}},
                "application/yaml": {"schema": {"$ref": "#/components/schemas/JobSpec"}},
            },
        },
        **keyed(404),
    },
)
def get_config(
    caller: Reader,
    control: The,
    job_id: JobId,
    format: Annotated[specs.ConfigFormat | None, Query(description="json or yaml; over the Accept header.")] = None,
    accept: Annotated[str, Depends(specs.accept_header)] = "",
) -> Response:
    """What the job is run with, presets and defaults filled in."""
    row = peek(control, caller, job_id)
    wanted = format or ("yaml" if "yaml" in accept else "json")
    return specs.as_config(row.spec, wanted)
