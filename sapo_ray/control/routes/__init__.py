"""The endpoints, one module per subject."""

from fastapi import APIRouter

from sapo_ray.control.routes import (
    actions,
    datasets,
    diagnosis,
    events,
    files,
    jobs,
    keys,
    link,
    logs,
    models,
    operations,
    scale,
)

ROUTERS: tuple[APIRouter, ...] = (
    jobs.router,
    actions.router,
    scale.router,
    diagnosis.router,
    events.router,
    logs.router,
    files.router,
    datasets.router,
    models.router,
    keys.router,
    operations.router,
    link.router,
)
"""In the order of the reference."""
