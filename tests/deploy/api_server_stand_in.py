"""A Kubernetes API server for tests: objects in memory, over TLS, refusing what the real one would.

Writes are validated by the schemas; resource versions, conflicts, generations and ownership are kept; a service account
may do what Roles and RoleBindings of its namespace grant, and nothing else. Nothing is scheduled and no pod starts.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import crd_schemas
import kube_schemas
from api_server_tools import REVIEWS, Failure, certificate, granted, json_patch, merge, review

Object = dict[str, Any]
ADMIN = "admin"
KINDS = {
    "pods": ("v1", "Pod"),
    "services": ("v1", "Service"),
    "configmaps": ("v1", "ConfigMap"),
    "secrets": ("v1", "Secret"),
    "events": ("v1", "Event"),
    "serviceaccounts": ("v1", "ServiceAccount"),
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim"),
    "deployments": ("apps/v1", "Deployment"),
    "roles": ("rbac.authorization.k8s.io/v1", "Role"),
    "rolebindings": ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    "networkpolicies": ("networking.k8s.io/v1", "NetworkPolicy"),
    "poddisruptionbudgets": ("policy/v1", "PodDisruptionBudget"),
    "ingresses": ("networking.k8s.io/v1", "Ingress"),
    "rayclusters": ("ray.io/v1", "RayCluster"),
}
PLURALS = {kind: plural for plural, (_, kind) in KINDS.items()}
PATH = re.compile(r"^/apis?/(?P<api>.+)/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?$")
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Kubernetes:
    """The server. `before_write` is called before each write, with verb and name, outside the lock."""

    def __init__(self, folder: Path) -> None:
        self.authority = folder / "ca.crt"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.renew()
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.log: list[tuple[str, str, str, int]] = []
        """User, verb, plural/name, status."""
        self.unknown: set[str] = set()
        """Kinds whose definitions are not installed."""
        self.before_write: Callable[[str, str], None] = lambda verb, name: None
        self._version = 100
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.socket = self._context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def renew(self) -> None:
        """Take another certificate by another authority of the same name, for connections made from now on."""
        key = self.authority.with_name("key.pem")
        certificate(self.authority, key)
        self._context.load_cert_chain(self.authority, key)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def account(self, folder: Path, name: str, namespace: str = "rl") -> Path:
        """A folder as a pod of this service account finds it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "token").write_text(f"sa:{namespace}:{name}")
        (folder / "namespace").write_text(namespace)
        (folder / "ca.crt").write_bytes(self.authority.read_bytes())
        return folder

    def install(self, objects: list[Object]) -> None:
        """As an administrator would; kinds that are not served here are left out."""
        for one in objects:
            if one["kind"] in PLURALS:
                self.do(ADMIN, "create", PLURALS[one["kind"]], one["metadata"]["namespace"], "", body=one)

    def get(self, kind: str, name: str, namespace: str = "rl") -> Object:
        """A copy of what is there."""
        with self._lock:
            return copy.deepcopy(self.objects[PLURALS[kind], namespace, name])

    def change(self, kind: str, name: str, change: Callable[[Object], None], namespace: str = "rl") -> None:
        """Write as somebody else would, with a new resource version."""
        with self._lock:
            thing = copy.deepcopy(self.objects[PLURALS[kind], namespace, name])
            change(thing)
            self._store((PLURALS[kind], namespace, name), thing)

    def do(self, user: str, verb: str, plural: str, namespace: str, name: str, **how: Any) -> Object:
        """One call. Raises Failure."""
        if not user:
            raise Failure(401, "Unauthorized", "Unauthorized")
        if plural not in KINDS or plural in self.unknown:
            raise Failure(404, "NotFound", "the server could not find the requested resource")
        if not self._may(user, verb, plural, namespace, name):
            group = KINDS[plural][0].rpartition("/")[0]
            raise Failure(
                403,
                "Forbidden",
                f'{plural}.{group} "{name}" is forbidden: User "{user}" cannot {verb} resource "{plural}" in API group '
                f'"{group}" in the namespace "{namespace}"',
            )
        if verb == "list":
            return self._list(plural, namespace, how["query"])
        if verb == "create":
            name = how["body"]["metadata"]["name"]
        if verb in VERBS.values():
            self.before_write(verb, name)
        with self._lock:
            return self._one(verb, (plural, namespace, name), **how)

    def _one(self, verb: str, key: tuple[str, str, str], body: Any = None, **how: Any) -> Object:
        plural, _, name = key
        if verb == "create":
            if key in self.objects:
                raise Failure(409, "AlreadyExists", f'{plural} "{name}" already exists')
            return self._store(key, copy.deepcopy(body))
        if key not in self.objects:
            raise Failure(404, "NotFound", f'{plural} "{name}" not found', name)
        live = self.objects[key]
        if verb == "delete":
            return self._delete(key)
        if verb == "get":
            return copy.deepcopy(live)
        if verb == "patch":
            body = json_patch(live, body) if "json-patch" in how["content"] else merge(copy.deepcopy(live), body)
        wanted = body["metadata"].get("resourceVersion")
        if wanted is not None and wanted != live["metadata"]["resourceVersion"]:
            raise Failure(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {plural} "{name}": the object has been modified; please apply your '
                "changes to the latest version and try again",
            )
        return self._store(key, copy.deepcopy(body))

    def _store(self, key: tuple[str, str, str], thing: Object) -> Object:
        api, kind = KINDS[key[0]]
        if (thing.get("apiVersion", api), thing.get("kind", kind)) != (api, kind):
            raise Failure(400, "BadRequest", f"{thing.get('kind')} is not {kind}")
        thing |= {"apiVersion": api, "kind": kind}
        meta, before = thing["metadata"], self.objects.get(key)
        self._check(thing)
        self._version += 1
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        born = before["metadata"] if before else {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 0}
        changed = before is None or before.get("spec") != thing.get("spec")
        meta |= {name: born[name] for name in ("uid", "creationTimestamp")}
        meta |= {"generation": born["generation"] + changed, "resourceVersion": str(self._version), "namespace": key[1]}
        self.objects[key] = thing
        return copy.deepcopy(thing)

    def _check(self, thing: Object) -> None:
        if thing["kind"] == "RayCluster":
            for group in thing["spec"].get("workerGroupSpecs", []):  # the schema's defaults
                for name, value in {"minReplicas": 0, "replicas": 0, "numOfHosts": 1, "scaleStrategy": {}}.items():
                    group.setdefault(name, value)
            if not crd_schemas.has_crds():
                return
        found = kube_schemas.problems({name: value for name, value in thing.items() if name != "status"})
        if found:
            raise Failure(422, "Invalid", f'{thing["kind"]} "{thing["metadata"]["name"]}" is invalid: {found[0]}')

    def _delete(self, key: tuple[str, str, str]) -> Object:
        """With what it owns."""
        gone = self.objects.pop(key)
        for other, thing in list(self.objects.items()):
            owners = thing["metadata"].get("ownerReferences", [])
            if other in self.objects and any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self._delete(other)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _list(self, plural: str, namespace: str, query: dict[str, str]) -> Object:
        selector = [part.partition("=")[::2] for part in query.get("labelSelector", "").split(",") if part]
        with self._lock:
            items = [
                copy.deepcopy(thing)
                for (kind, where, _), thing in self.objects.items()
                if (kind, where) == (plural, namespace)
                and all(thing["metadata"].get("labels", {}).get(name) == value for name, value in selector)
            ]
        api, kind = KINDS[plural]
        return {
            "apiVersion": api,
            "kind": f"{kind}List",
            "metadata": {"resourceVersion": str(self._version)},
            "items": items,
        }

    def _may(self, user: str, verb: str, plural: str, namespace: str, name: str) -> bool:
        group = KINDS[plural][0].rpartition("/")[0]
        return user == ADMIN or granted(self.rules(user, namespace), verb, group, plural, name)

    def rules(self, user: str, namespace: str) -> list[Object]:
        """What Roles grant an account."""
        _, where, account = user.split(":")
        with self._lock:
            bindings = [
                thing
                for (kind, place, _), thing in self.objects.items()
                if (kind, place) == ("rolebindings", namespace)
            ]
            subject = {"kind": "ServiceAccount", "name": account, "namespace": where}
            roles = [one["roleRef"]["name"] for one in bindings if subject in one["subjects"]]
            return [rule for role in roles for rule in self.objects["roles", namespace, role]["rules"]]

    def review(self, user: str, body: Object) -> Object:
        """What an account may do. Raises Failure."""
        if not user:
            raise Failure(401, "Unauthorized", "Unauthorized")
        namespace = body["spec"]["resourceAttributes"]["namespace"]
        return review(self.rules(user, namespace), namespace, body)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Kubernetes

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        address = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        user = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        match = PATH.match(address.path)
        code, verb, plural, name = 200, "", "", ""
        try:
            if (self.command, address.path) == ("POST", REVIEWS):
                self._say(201, self.server_of.review(user, json.loads(raw)))
                return
            if match is None:
                raise Failure(404, "NotFound", "the server could not find the requested resource")
            plural, name = match["plural"], match["name"] or ""
            verb = VERBS.get(self.command, "get" if name else "list")
            body = self.server_of.do(
                user,
                verb,
                plural,
                match["namespace"],
                name,
                **(
                    {"query": {key: value[0] for key, value in parse_qs(address.query).items()}}
                    if verb == "list"
                    else {}
                ),
                **({"body": json.loads(raw)} if verb in ("create", "update", "patch") else {}),
                **({"content": self.headers.get("Content-Type", "")} if verb == "patch" else {}),
            )
            code = 201 if verb == "create" else 200
        except Failure as failure:
            code, body = failure.code, failure.body
        self.server_of.log.append((user, verb, f"{plural}/{name}", code))
        self._say(code, body)

    def _say(self, code: int, body: Object) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer
