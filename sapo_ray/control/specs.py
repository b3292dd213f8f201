"""From the spec in a request to a job that may run here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from fastapi import Header, Response
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from sapo_ray.api.problems import FieldProblem
from sapo_ray.config.load import resolve
from sapo_ray.config.spec import JobSpec
from sapo_ray.control import confine
from sapo_ray.control.access import Caller
from sapo_ray.control.problems import Refused, several
from sapo_ray.control.service import Control
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import KeyRow, datasets
from sapo_ray.errors import ConfigError

MOST_STEPS = 1_000_000_000
MOST_WORKERS = 10_000
ConfigFormat = Literal["json", "yaml"]
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")


def checked(control: Control, caller: Caller, spec: Mapping[str, Any]) -> JobSpec:
    """The resolved job. Raises Refused: 422 with every problem of it, 403 for what the operator does not allow."""
    try:
        resolved = resolve(spec, source="spec")
    except ConfigError as error:
        raise several(as_problems(str(error)), code="invalid_job", status=422, what="the job") from None
    too_large = [
        FieldProblem(param=key, detail=f"{key} must be <= {most}, got {value}")
        for key, value, most in (
            ("steps", resolved.steps, MOST_STEPS),
            ("rollout.workers", resolved.rollout.workers, MOST_WORKERS),
        )
        if value > most
    ]
    if too_large:
        raise several(too_large, code="invalid_job", status=422, what="the job")
    with control.store.read() as session:
        check_allowed(session, caller.tenant, resolved, control.settings)
    return resolved


def check_allowed(session: Session, tenant: str, spec: JobSpec, settings: Settings) -> None:
    """Raises Refused (403) with everything that the operator does not allow the tenant's job."""
    confine.check(
        spec,
        settings,
        tenant,
        stored_path=lambda id: stored_path(session, tenant, id),
        several_tenants=lambda: several_tenants(session),
    )


def hold_datasets(session: Session, tenant: str, spec: JobSpec) -> None:
    """Keep the job's data sets from being deleted until this transaction has stored it. Raises Refused (403)."""
    wanted = confine.dataset_ids(spec.model_dump(mode="json"))
    gone = wanted - datasets.hold(session, tenant, wanted)
    if gone:
        detail = f"the data set {min(gone)} was deleted; GET /v1/datasets lists those there are"
        raise Refused(403, "not_allowed", detail, param="data")


def as_problems(message: str) -> list[FieldProblem]:
    """The problems in a ConfigError of `resolve`, each with the key that it begins with."""
    heading, *listed = message.split("\n  - ")
    found = listed or [heading.removeprefix("spec: ")]
    return [FieldProblem(param=_key_of(line), detail=line) for line in found]


def stored_path(session: Session, tenant: str, dataset_id: str) -> str | None:
    """The file of one of the tenant's data sets."""
    row = datasets.get(session, tenant, dataset_id)
    return None if row is None else row.path


def several_tenants(session: Session) -> bool:
    """Whether more than one tenant has keys that are valid."""
    count = session.scalar(select(func.count(KeyRow.tenant.distinct())).where(KeyRow.revoked_at.is_(None)))
    return (count or 0) > 1


async def accept_header(accept: Annotated[str, Header(include_in_schema=False)] = "") -> str:
    """Dependency: what the client would like to have."""
    return accept.lower()


def as_config(spec: Mapping[str, Any], kind: ConfigFormat) -> Response:
    """The resolved job as JSON, or as a job file."""
    if kind == "yaml":
        text = yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True)
        return Response(text, media_type="application/yaml")
    return Response(json.dumps(spec, ensure_ascii=False), media_type="application/json")


def _key_of(line: str) -> str | None:
    """The key that a message begins with; one that begins with a word has no dots, and is no section."""
    match = _KEY.match(line)
    key = match.group() if match else ""
    return key if "." in key or key in JobSpec.model_fields or f"{key} is not a key" in line else None
