"""What the service tells about things other than jobs. Fields that a newer service adds are passed over."""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sapo_ray.client.errors import BadReply

M = TypeVar("M", bound=BaseModel)


class Shape(BaseModel):
    """Base: read-only, unknown fields kept for whoever looks."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)


class Checked(Shape):
    """Answer to a dry run: the job is valid."""

    valid: bool
    spec: dict[str, Any]
    """The resolved job, every key of it."""


class LogPart(Shape):
    """A part of a log file."""

    data: bytes
    next_offset: int
    """Byte after the last one of `data`; ask for it to read on."""


class Dataset(Shape):
    """Uploaded data; `data.train: [{path: dataset:<id>}]` uses it."""

    id: str
    name: str
    format: str
    """jsonl or parquet."""
    rows: int
    bytes: int
    sha256: str
    columns: list[str] | dict[str, Any] = []
    created_at: datetime


class ApiKey(Shape):
    """An API key without its secret."""

    id: str
    name: str
    tenant: str
    scopes: list[str]
    """read, submit, admin."""
    prefix: str
    """The first characters of the secret, to tell keys apart."""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class NewApiKey(ApiKey):
    """A key at its birth: the only time that the secret is shown."""

    secret: str


def read(kind: type[M], data: object) -> M:
    """`data` as `kind`; unknown fields are no error, missing ones are.

    Raises:
        BadReply: the service speaks another version of the API, or is another service.
    """
    try:
        return kind.model_validate(data, extra="ignore" if kind.model_config.get("extra") == "forbid" else None)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise BadReply(f"the service sent a {kind.__name__} that this client cannot read ({found})") from None
