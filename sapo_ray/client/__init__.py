"""The service from Python: `from sapo_ray import Client`."""

from sapo_ray.api.jobs import LIVE, TERMINAL, Event, Job, ObservedWorkers, Scale, ScaleState
from sapo_ray.client.errors import (
    ApiError,
    BadReply,
    ClientError,
    Conflict,
    ConnectionFailed,
    Forbidden,
    Invalid,
    NotFound,
    RateLimited,
    Unauthorized,
    Unavailable,
)
from sapo_ray.client.service import Client
from sapo_ray.client.shapes import ApiKey, Checked, Dataset, NewApiKey

__all__ = [
    "LIVE",
    "TERMINAL",
    "ApiError",
    "ApiKey",
    "BadReply",
    "Checked",
    "Client",
    "ClientError",
    "Conflict",
    "ConnectionFailed",
    "Dataset",
    "Event",
    "Forbidden",
    "Invalid",
    "Job",
    "NewApiKey",
    "NotFound",
    "ObservedWorkers",
    "RateLimited",
    "Scale",
    "ScaleState",
    "Unauthorized",
    "Unavailable",
]
