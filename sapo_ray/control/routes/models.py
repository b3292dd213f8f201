"""What jobs may name here."""

from __future__ import annotations

from fastapi import APIRouter, Response

from sapo_ray.api.jobs import Wire
from sapo_ray.control import tenant_secrets, views
from sapo_ray.control.access import Reader
from sapo_ray.control.documents import keyed
from sapo_ray.control.service import The, respond

router = APIRouter(prefix="/v1/models", tags=["data"])


class Allowed(Wire):
    """A model, or a pattern of models."""

    path: str
    """For `model.path`; `*` stands for anything."""


class AllowedList(views.Page):
    """What the operator allows."""

    data: list[Allowed]
    """Models."""
    data_paths: list[str]
    """What `data.train` and `evaluation.data` may name; `dataset:*` are uploads of the tenant."""
    rewards: list[str]
    """What `verifier.reward` may name; empty: no rewards of one's own."""
    outputs: list[str]
    """What `output.uri` may name; empty: models stay with their jobs."""
    secrets: list[str]
    """What `secrets` may name: those that the operator keeps for the tenant."""
    trust_remote_code: bool
    """Whether `model.trust_remote_code` may be true."""


@router.get(
    "",
    operation_id="list_models",
    summary="What jobs may name: models, data, rewards, outputs, secrets",
    response_model=AllowedList,
    responses=keyed(),
)
def list_models(caller: Reader, control: The) -> Response:
    """As the operator has set it."""
    settings = control.settings
    return respond(
        AllowedList(
            data=[Allowed(path=pattern) for pattern in settings.allow_models],
            data_paths=settings.allow_data,
            rewards=settings.allow_rewards,
            outputs=settings.allow_outputs,
            secrets=tenant_secrets.names(settings.secrets_dir, caller.tenant),
            trust_remote_code=settings.allow_trust_remote_code,
        )
    )
