"""What the chart finds missing in the namespace, by Helm's own lookups at an API server that answers them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from chart_rendering import CASES, FEATURES, Object, chart, helm, overlaid, render

KINDS = {"configmaps": "ConfigMap", "secrets": "Secret", "persistentvolumeclaims": "PersistentVolumeClaim"}
NEEDED: dict[str, tuple[str, ...]] = {
    "db": ("url",),
    "admin": ("admin-key",),
    "research-tokens": ("HF_TOKEN",),
    "lab": ("WANDB_API_KEY",),
    "ray-token": ("auth_token",),
    "redis": ("password",),
}
"""Secrets of the case "all on", with the keys that they must have."""
Refusal = Callable[..., str]


def secret(name: str, *keys: str) -> Object:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": dict.fromkeys(keys, "eA==")}


def secrets(**changed: tuple[str, ...] | None) -> list[Object]:
    """The needed ones, with these in their place, or without them."""
    wanted = NEEDED | {name.replace("_", "-"): keys for name, keys in changed.items()}
    return [secret(name, *keys) for name, keys in wanted.items() if keys is not None]


@pytest.fixture(scope="module")
def namespace() -> Iterator[tuple[dict[str, Object], int]]:
    """What is in it, by path; and the API server's port."""
    there: dict[str, Object] = {}
    kinds = [{"name": name, "kind": kind, "namespaced": True, "verbs": ["get"]} for name, kind in KINDS.items()]

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            found: Mapping[str, Any] | None = there.get(path.removeprefix("/api/v1/namespaces/rl/"))
            if path == "/api/v1":
                found = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "v1", "resources": kinds}
            gone = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            text = json.dumps(found or gone).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        yield there, server.server_port
        server.shutdown()
        thread.join(5)


@pytest.fixture
def refusal(namespace: tuple[dict[str, Object], int]) -> Refusal:
    """What an installation into a namespace with these objects is refused for; nothing if it is not."""
    there, port = namespace

    def ask(values: Object, objects: list[Object], exists: bool = True) -> str:
        there.clear()
        authority = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt"}}
        plurals = {kind: plural for plural, kind in KINDS.items()}
        for one in [*objects, *([authority] if exists else [])]:
            there[f"{plurals[one['kind']]}/{one['metadata']['name']}"] = one
        where = {"kube_apiserver": f"http://127.0.0.1:{port}", "kubeconfig_content": "apiVersion: v1\nkind: Config\n"}
        with helm.Config(namespace="rl", **where) as config:
            try:
                config.render(chart(), values, name="demo", namespace="rl")
            except helm.HelmError as error:
                return str(error)
        return ""

    return ask


def test_every_secret_that_is_missing_is_named_at_once_with_the_command_that_makes_it(refusal: Refusal) -> None:
    message = refusal(CASES["all on"], [])
    make = "kubectl -n rl create secret generic"
    for said in (
        "database.postgresql.existingSecret: there is no Secret db in namespace rl; make it with "
        f"`{make} db --from-literal=url=postgresql+psycopg://user:password@host/name`",
        f"control.adminKey.existingSecret: there is no Secret admin in namespace rl; make it with `{make} admin "
        "--from-literal=admin-key=$(openssl rand -hex 24)`",
        "control.tenantSecrets.research: there is no Secret research-tokens",
        "control.tenantSecrets.Lab.2: there is no Secret lab",
        "ray.auth.existingSecret: there is no Secret ray-token",
        f"`{make} ray-token --from-literal=auth_token=$(openssl rand -hex 32)`",
        "ray.gcsFaultTolerance.existingSecret: there is no Secret redis",
    ):
        assert said in message
    assert message.count("\n  - ") == len(NEEDED)


def test_with_all_secrets_there_and_their_keys_in_them_nothing_is_refused(refusal: Refusal) -> None:
    assert refusal(CASES["all on"], secrets()) == ""
    assert refusal(CASES["defaults"], []) == ""


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("db", "database.postgresql.key", "url"),
        ("admin", "control.adminKey.key", "admin-key"),
        ("ray_token", "", "auth_token"),
        ("redis", "ray.gcsFaultTolerance.passwordKey", "password"),
    ],
)
def test_a_secret_without_its_key_is_refused(refusal: Refusal, name: str, value: str, key: str) -> None:
    message = refusal(CASES["all on"], secrets(**{name: ("something-else",)}))
    assert message.count("\n  - ") == 1
    assert f"Secret {name.replace('_', '-')} in namespace rl has no key {key}; add it with `kubectl -n rl" in message
    assert ("one that it has" in message) == bool(value)
    assert value in message


def test_an_external_cluster_needs_its_token_and_none_of_the_charts(refusal: Refusal) -> None:
    assert "ray.external.tokenSecret: there is no Secret ray-token" in refusal(FEATURES["external"], [])
    assert refusal(FEATURES["external"], [secret("ray-token", "auth_token")]) == ""


def test_what_is_switched_off_needs_no_secret(refusal: Refusal) -> None:
    off = {"ray": {"gcsFaultTolerance": {"enabled": False}}, "database": {"kind": "sqlite"}, "control": {"replicas": 1}}
    assert refusal(overlaid(CASES["all on"], off), secrets(db=None, redis=None)) == ""


def test_where_helm_cannot_look_nothing_is_missing(refusal: Refusal) -> None:
    """`helm template`, and a namespace that is made by the same command."""
    assert render(CASES["all on"])
    assert refusal(CASES["all on"], [], exists=False) == ""


def test_a_claim_that_pods_of_several_nodes_cannot_share_is_refused(refusal: Refusal) -> None:
    claim: Object = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "runs"}}
    values = {"storage": {"existingClaim": "runs"}}
    assert refusal(values, [claim | {"spec": {"accessModes": ["ReadWriteMany"]}}]) == ""
    message = refusal(values, [claim | {"spec": {"accessModes": ["ReadWriteOnce"]}}])
    assert "storage.existingClaim: runs is not ReadWriteMany" in message
