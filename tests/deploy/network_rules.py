"""What NetworkPolicies let through, as Kubernetes documents them: who is selected is isolated, but for any rule."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A pod, or an address outside (then without labels)."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "rl"
    address: str = "10.244.0.9"

    @property
    def is_pod(self) -> bool:
        return bool(self.labels)


def passes(policies: Iterable[Object], source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection is let out of its source and into its target."""
    policies = list(policies)
    return _side(policies, "Egress", source, target, port, protocol) and _side(
        policies, "Ingress", target, source, port, protocol
    )


def _side(policies: list[Object], way: str, pod: Place, peer: Place, port: int, protocol: str) -> bool:
    if not pod.is_pod:
        return True
    mine = [
        one
        for one in policies
        if one["metadata"]["namespace"] == pod.namespace
        and way in one["spec"]["policyTypes"]
        and _selects(one["spec"]["podSelector"], pod.labels)
    ]
    if not mine:
        return True
    key = "to" if way == "Egress" else "from"
    return any(
        _peers(rule.get(key), one["metadata"]["namespace"], peer) and _ports(rule.get("ports"), port, protocol)
        for one in mine
        for rule in one["spec"].get(way.lower(), [])
    )


def _peers(peers: list[Object] | None, namespace: str, peer: Place) -> bool:
    return not peers or any(_peer(one, namespace, peer) for one in peers)


def _peer(one: Object, namespace: str, peer: Place) -> bool:
    if "ipBlock" in one:
        block = ipaddress.ip_network(one["ipBlock"]["cidr"])
        address = ipaddress.ip_address(peer.address)
        excepted = [ipaddress.ip_network(part) for part in one["ipBlock"].get("except", [])]
        if address.version != block.version:
            return False
        return address in block and not any(address in part for part in excepted)
    if not peer.is_pod:
        return False
    if "namespaceSelector" in one:
        if not _selects(one["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace}):
            return False
    elif peer.namespace != namespace:
        return False
    return _selects(one.get("podSelector", {}), peer.labels)


def _ports(ports: list[Object] | None, port: int, protocol: str) -> bool:
    return not ports or any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports)


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    exact = all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", rule
        exact = exact and labels.get(rule["key"]) in rule["values"]
    return exact
