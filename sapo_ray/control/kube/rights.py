"""What the launcher may do at Kubernetes' API, asked of the API itself: nothing is made or read for it."""

from __future__ import annotations

from dataclasses import dataclass

from sapo_ray.control.kube.client import (
    DEPLOYMENTS,
    EVENTS,
    NETWORKPOLICIES,
    PODS,
    RAYCLUSTERS,
    SECRETS,
    KubeClient,
)
from sapo_ray.control.kube.making import Options


@dataclass(frozen=True, kw_only=True, slots=True)
class Right:
    """One verb on one kind of object; `name` is the one object that is meant, empty for all of the namespace."""

    verb: str
    resource: str
    name: str = ""

    def __str__(self) -> str:
        """As `kubectl auth can-i` takes it: `create rayclusters.ray.io`, `get deployments.apps/sapo`."""
        api, _, kind = self.resource.rpartition("/")
        group, _, _ = api.rpartition("/")
        return f"{self.verb} {kind}{f'.{group}' if group else ''}{f'/{self.name}' if self.name else ''}"


def needed(options: Options) -> list[Right]:
    """Every right that a launcher with these options uses."""
    always = {
        RAYCLUSTERS: ("get", "list", "create", "patch", "delete"),
        PODS: ("list",),
        EVENTS: ("list",),
        SECRETS: ("create",),
    }
    found = [Right(verb=verb, resource=resource) for resource, verbs in always.items() for verb in verbs]
    if options.network_policy:
        found.append(Right(verb="create", resource=NETWORKPOLICIES))
    if options.owner:
        found.append(Right(verb="get", resource=DEPLOYMENTS, name=options.owner))
    return found


def lacking(api: KubeClient, options: Options) -> list[str]:
    """Those that the service's account does not have. Raises LauncherUnavailable if that cannot be asked."""
    return [str(one) for one in needed(options) if not api.may(one.verb, one.resource, one.name)]
