"""Run by Alembic, on the connection and in the transaction of `sapo_ray.control.store.migrate`."""

from alembic import context

from sapo_ray.control.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
