"""An index in the order of the queue, so that a job's place in it is counted without reading the jobs."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("ix_jobs_tenant_state_priority_id", "jobs", ["tenant", "state", "priority", "id"], unique=False)
