"""Data sets, models and API keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from sapo_ray.client.paging import rows
from sapo_ray.client.shapes import ApiKey, Dataset, NewApiKey, read
from sapo_ray.client.transport import Transport, new_key
from sapo_ray.errors import DataError

MEDIA_TYPES = {"jsonl": "application/jsonl", "parquet": "application/vnd.apache.parquet"}
VALIDATION_S = 600.0
"""Longest wait, after the last byte of an upload, for the service to look at all rows."""
_CHUNK = 1 << 18
Rows = list[dict[str, Any]]


class Datasets:
    """`client.datasets`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(
        self, path: str | Path, *, name: str | None = None, format: Literal["jsonl", "parquet"] | None = None
    ) -> Dataset:
        """Send a JSONL or Parquet file; use it in a job as `path: dataset:<id>`.

        Args:
            name: shown in lists; the file's name if not given.
            format: by the file's name if not given.

        Raises:
            DataError: the file cannot be read, or its format is not known.
            Invalid: the service found a bad row; `errors` names the line.
        """
        source = Path(path)
        kind = format or source.suffix.lower().removeprefix(".")
        if kind not in MEDIA_TYPES:
            raise DataError(f"{source} must end in .jsonl or .parquet, or say format='jsonl' or 'parquet'")
        try:
            reply = self._transport.request(
                "POST",
                "/v1/datasets",
                params={"name": name or source.name, "format": kind},
                content=lambda: _chunks(source),
                headers={"Content-Type": MEDIA_TYPES[kind], "Content-Length": str(source.stat().st_size)},
                idempotency_key=new_key(),
                read_timeout=VALIDATION_S,
            )
        except OSError as error:
            raise DataError(f"{source} cannot be read: {error.strerror or error}") from error
        return read(Dataset, reply.json())

    def list(self, limit: int | None = None) -> Iterator[Dataset]:
        """All data sets of the tenant, newest first."""
        for row in rows(self._transport, "/v1/datasets", limit=limit):
            yield read(Dataset, row)

    def get(self, dataset_id: str) -> Dataset:
        """One data set's description."""
        return read(Dataset, self._transport.request("GET", f"/v1/datasets/{quote(dataset_id, safe='')}").json())

    def delete(self, dataset_id: str) -> None:
        """Remove the data set. Conflict while a job that has not ended reads it."""
        self._transport.request("DELETE", f"/v1/datasets/{quote(dataset_id, safe='')}")


class Models:
    """`client.models`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Rows:
        """What `model.path` of a job may name here: names, or patterns with `*`."""
        return list(rows(self._transport, "/v1/models"))


class Keys:
    """`client.keys`; needs a key of scope admin."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        name: str,
        *,
        scopes: Sequence[str] = ("read", "submit"),
        tenant: str | None = None,
        expires_at: datetime | None = None,
    ) -> NewApiKey:
        """A new key. Its `secret` is shown this once; the service keeps a hash only."""
        body: dict[str, Any] = {"name": name, "scopes": list(scopes)}
        if tenant is not None:
            body["tenant"] = tenant
        if expires_at is not None:
            body["expires_at"] = expires_at.astimezone().isoformat()
        # Without an idempotency key: the service could only replay the answer if it had kept the secret.
        return read(NewApiKey, self._transport.request("POST", "/v1/api-keys", body=body).json())

    def list(self) -> Iterator[ApiKey]:
        """All keys that this key may see."""
        for row in rows(self._transport, "/v1/api-keys"):
            yield read(ApiKey, row)

    def revoke(self, key_id: str) -> None:
        """From now on requests with the key are refused."""
        self._transport.request("DELETE", f"/v1/api-keys/{quote(key_id, safe='')}")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
