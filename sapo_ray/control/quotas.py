"""How much a tenant may leave with the service. Running jobs have no quota: they wait for one another."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from sapo_ray.control.problems import Refused
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import DatasetRow, JobRow


def check_queue(session: Session, tenant: str, settings: Settings) -> None:
    """Raises Refused if the tenant has as many queued jobs as it may."""
    most = settings.max_queued_per_tenant
    queued = select(JobRow.id).where(JobRow.tenant == tenant, JobRow.state == "queued").limit(most)
    found = session.scalar(select(func.count()).select_from(queued.subquery())) or 0
    if found >= most:
        raise Refused(
            409,
            "quota_exceeded",
            f"{found} jobs of this tenant are queued, of at most {most}",
            hint="submit again when some have started, or cancel some; the operator sets SAPO_MAX_QUEUED_PER_TENANT",
        )


def check_datasets(session: Session, tenant: str, more: int, settings: Settings) -> None:
    """Raises Refused if `more` bytes are beyond what the tenant's data sets may have."""
    most = settings.max_dataset_bytes_per_tenant
    kept = select(func.sum(DatasetRow.bytes)).where(DatasetRow.tenant == tenant, DatasetRow.deleted_at.is_(None))
    found = int(session.scalar(kept) or 0)
    if found + more > most:
        raise Refused(
            409,
            "quota_exceeded",
            f"the data sets of this tenant have {found} bytes, and with {more} more they would exceed {most}",
            hint="delete some that no job needs; the operator sets SAPO_MAX_DATASET_BYTES_PER_TENANT",
        )
