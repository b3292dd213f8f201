"""API keys: made, listed and revoked by admins; the operator's admins see to all tenants."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from pydantic import AwareDatetime, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from sapo_ray.api.jobs import Wire
from sapo_ray.control import body, views
from sapo_ray.control.access import Admin, Caller, Scope
from sapo_ray.control.documents import changing, json_body, keyed
from sapo_ray.control.problems import Refused, invalid, not_found
from sapo_ray.control.service import The, respond
from sapo_ray.control.store import keys

router = APIRouter(prefix="/v1/api-keys", tags=["keys"])


def _no_number(value: Any) -> Any:
    if value is not None and (not isinstance(value, str) or value.strip("-+. ").isdigit()):
        raise PydanticCustomError("no_date", "a date and time with a time zone is wanted, e.g. 2030-01-31T12:00:00Z")
    return value


def _usual() -> list[Scope]:
    return ["read", "submit"]


class KeyRequest(Wire):
    """A key to be made."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """What it is for."""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)] = Field(default_factory=_usual)
    """read: look; submit: make and change; admin: both, and keys. read and submit if not given."""
    tenant: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] | None = None
    """Whose things it reaches; the caller's own if not given. Only the operator's admins may name another."""
    expires_at: Annotated[AwareDatetime | None, BeforeValidator(_no_number)] = None
    """From then on it is refused; never if not given."""


@router.post(
    "",
    operation_id="create_api_key",
    summary="Make a key",
    status_code=201,
    response_model=views.NewApiKey,
    responses={201: {"description": "The key. Its secret is shown this once."}, **changing()},
    openapi_extra=json_body(KeyRequest, {"for a pipeline": {"name": "nightly", "scopes": ["read", "submit"]}}),
)
def create_key(
    caller: Admin, control: The, wanted: Annotated[KeyRequest, Depends(body.body_of(KeyRequest))]
) -> Response:
    """No Idempotency-Key here: to repeat the answer the service would have to keep the secret."""
    tenant = wanted.tenant or caller.tenant
    if tenant != caller.tenant and not caller.operator:
        raise Refused(
            403,
            "forbidden",
            f"only the operator's admins make keys of another tenant, here {tenant!r}",
            param="tenant",
        )
    expires_at = wanted.expires_at.timestamp() if wanted.expires_at else None
    if expires_at is not None and expires_at <= time.time():
        raise invalid("expires_at must be in the future", "expires_at")
    with control.store.begin() as session:
        row, secret = keys.create_key(session, tenant, wanted.name, sorted(set(wanted.scopes)), expires_at=expires_at)
        return respond(views.NewApiKey(**views.key_fields(row), secret=secret), 201)


@router.get(
    "",
    operation_id="list_api_keys",
    summary="List keys",
    response_model=views.KeyList,
    responses=keyed(),
)
def list_keys(caller: Admin, control: The) -> Response:
    """The tenant's; the operator's admins see all. Revoked ones are there too."""
    with control.store.read() as session:
        rows = keys.list_keys(session, _reach(caller))
    return respond(views.KeyList(data=[views.ApiKey(**views.key_fields(row)) for row in rows]))


@router.delete(
    "/{key_id}",
    operation_id="revoke_api_key",
    summary="Revoke a key",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "Requests with it are refused, on other replicas within 5 s."}, **keyed(404)},
)
def revoke_key(
    caller: Admin,
    control: The,
    key_id: Annotated[str, Path(description="Id of the key.", examples=["key-2gd4q7x3zkmbw6tfh5ye"])],
) -> Response:
    """For good. A second time changes nothing."""
    with control.store.begin() as session:
        row = keys.get_key(session, _reach(caller), key_id)
        if row is None:
            raise not_found(f"key {key_id[:64]!r}")
        keys.revoke(session, row)
    control.gate.forget(key_id)
    return Response(status_code=204)


def _reach(caller: Caller) -> str | None:
    return None if caller.operator else caller.tenant
