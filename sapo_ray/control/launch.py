"""What a driver is given to run: the job, checked as it was at its submission, and the secrets that it names.

Meanwhile the operator may have decided otherwise: another list of what is allowed, a secret taken away, a second tenant
beside whom nobody's own code is to run. A job that is running is left alone; what is refused is its next attempt.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from sapo_ray.config.spec import JobSpec
from sapo_ray.control import confine, specs, tenant_secrets
from sapo_ray.control.problems import Refused
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import JobRow, Superseded, jobs

_GOING = frozenset({"starting", "running", "recovering"})


def what_to_run(session: Session, row: JobRow, settings: Settings) -> tuple[JobSpec, dict[str, str]]:
    """The job with its data sets' files, and its secrets' values. Raises Refused."""
    spec = JobSpec.model_validate(row.spec)
    specs.check_allowed(session, row.tenant, spec, settings)
    try:
        secrets = tenant_secrets.values(settings.secrets_dir, row.tenant, spec.secrets)
    except tenant_secrets.Unusable as error:  # taken away since the line above
        raise Refused(403, "not_allowed", f"secrets: {error}", param="secrets") from None
    return confine.with_files(spec, lambda id: specs.stored_path(session, row.tenant, id)), secrets


def give_up(session: Session, job_id: str, attempt: int, refused: Refused) -> str:
    """End a job that may not be launched as it is, or pause it where it would lose what it has learned.

    Returns the reason. Raises Superseded for an attempt that is not the job's newest.
    """
    row = jobs.get_job(session, None, job_id, lock=True)
    if row is None or row.attempt != attempt:
        raise Superseded(0 if row is None else row.attempt)
    problem = refused.problem
    reason = "it was not launched: " + ("; ".join(one.detail for one in problem.errors) or problem.detail)
    if row.state not in _GOING:  # it is being paused or cancelled, which goes on without a driver
        return reason
    if row.step == 0:
        jobs.set_state(session, row, "failed", reason, allowed=_GOING)
        return reason
    row.desired_state = "pause"
    kept = f"{reason}; its checkpoint is kept: resume it when that is mended"
    jobs.set_state(session, row, "paused", kept, allowed=_GOING)
    return kept
