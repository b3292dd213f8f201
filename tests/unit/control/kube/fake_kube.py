"""A Kubernetes API server for tests, over HTTP: stricter than a real one, and able to fail on demand.

It checks tokens and rights, names, labels, owners and (where the CRD is there) schemas; it knows resource versions,
conflicts, merge patches, label and field selectors, finalizers, and deletes what a deleted object owned.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import crd_schemas
from api_server_tools import REVIEWS, Failure, granted, merge, review

Object = dict[str, Any]
KINDS = {
    "ray.io/v1/rayclusters": "RayCluster",
    "v1/pods": "Pod",
    "v1/secrets": "Secret",
    "v1/events": "Event",
    "apps/v1/deployments": "Deployment",
    "networking.k8s.io/v1/networkpolicies": "NetworkPolicy",
}
NAMESPACE = "jobs"
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?")


class FakeKube:
    """The server and its objects. `lock` guards them; a test that changes some holds it."""

    def __init__(self, rules: list[Object]) -> None:
        self.rules = rules
        self.tokens = {"sesame"}
        self.quota: dict[str, int] = {}
        """Most objects of a resource."""
        self.denied = ""
        """Why an admission policy lets no cluster be made."""
        self.objects: dict[tuple[str, str], Object] = {}
        self.lock = threading.RLock()
        self.used: set[tuple[str, str]] = set()
        """Rights that were used: resource, verb."""
        self.requests: list[str] = []
        self.fault: Callable[[str, str], str | int | None] = lambda method, path: None
        """Asked for each request: a status to answer with, `lost` (not done), `unanswered` (done), or None."""
        self._versions = itertools.count(1000)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- for tests and controllers ------------------------------------------------------------------------------

    def of(self, resource: str) -> dict[str, Object]:
        """Objects of a resource by name."""
        return {name: one for (kind, name), one in self.objects.items() if kind == resource}

    def put(self, resource: str, body: Object) -> Object:
        """Create or replace, as a controller with all rights; the object gets a new version."""
        with self.lock:
            metadata = body["metadata"]
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("namespace", NAMESPACE)
            metadata.setdefault("creationTimestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
            metadata["resourceVersion"] = str(next(self._versions))
            self.objects[resource, metadata["name"]] = body
            return body

    def delete(self, resource: str, name: str) -> None:
        """Delete, or mark where finalizers hold it; what it owns goes after it."""
        with self.lock:
            found = self.objects[resource, name]
            if found["metadata"].get("finalizers"):
                found["metadata"].setdefault("deletionTimestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
                self.put(resource, found)
                return
            del self.objects[resource, name]
            for (kind, other), one in list(self.objects.items()):
                owners = [owner["uid"] for owner in one["metadata"].get("ownerReferences") or []]
                if found["metadata"]["uid"] in owners and (kind, other) in self.objects:
                    self.delete(kind, other)

    # --- requests -----------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, headers: Any, raw: bytes) -> tuple[int, Object]:
        """One request of a client, whole or not at all."""
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if (method, url.path) == ("POST", REVIEWS):
            with self.lock:
                self._authenticate(headers)
                return 201, review(self.rules, NAMESPACE, json.loads(raw))
        resource, name = _split(url.path)
        with self.lock:
            self._authorise(method, resource, name, headers)
            if resource not in KINDS:
                raise Failure(404, "NotFound", "the server could not find the requested resource")
            body = json.loads(raw) if raw else {}
            if method == "GET" and not name:
                return 200, self._list(resource, query)
            if method == "POST":
                return 201, self._create(resource, body)
            found = self.objects.get((resource, name))
            if found is None:
                raise Failure(404, "NotFound", f'{resource} "{name}" not found', name)
            if method == "GET":
                return 200, found
            if method == "PATCH":
                assert headers["Content-Type"] == "application/merge-patch+json", headers["Content-Type"]
                return 200, self._patch(resource, found, body)
            assert body.get("propagationPolicy") == "Background"
            self.delete(resource, name)
            return 200, {"kind": "Status", "status": "Success"}

    def _authenticate(self, headers: Any) -> None:
        if (headers["Authorization"] or "").removeprefix("Bearer ") not in self.tokens:
            raise Failure(401, "Unauthorized", "Unauthorized")

    def _authorise(self, method: str, resource: str, name: str, headers: Any) -> None:
        self._authenticate(headers)
        verbs = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
        verb = verbs.get(method) or ("get" if name else "list")
        group, _, plural = resource.rpartition("/")
        group = group.rpartition("/")[0]
        if not granted(self.rules, verb, group, plural, name):
            raise Failure(403, "Forbidden", f'{plural} is forbidden: User "sapo" cannot {verb} resource "{plural}"')
        self.used.add((plural, verb))

    def _list(self, resource: str, query: dict[str, str]) -> Object:
        assert query.keys() <= {"labelSelector", "fieldSelector", "limit"}, query
        items = list(self.of(resource).values())
        for key, value in _pairs(query.get("labelSelector", "")):
            items = [one for one in items if (one["metadata"].get("labels") or {}).get(key) == value]
        for key, value in _pairs(query.get("fieldSelector", "")):
            items = [one for one in items if _field(one, key) == value]
        return {"kind": KINDS[resource] + "List", "items": items[: int(query.get("limit", 1_000_000))]}

    def _create(self, resource: str, body: Object) -> Object:
        name = body["metadata"]["name"]
        if (resource, name) in self.objects:
            raise Failure(409, "AlreadyExists", f'{resource} "{name}" already exists', name)
        if self.denied and resource == "ray.io/v1/rayclusters":
            raise Failure(403, "Forbidden", self.denied)
        if len(self.of(resource)) >= self.quota.get(resource, 1_000_000):
            raise Failure(403, "Forbidden", f'{resource} "{name}" is forbidden: exceeded quota: team')
        self._validate(resource, body)
        return self.put(resource, body | {"metadata": dict(body["metadata"]) | {"generation": 1}})

    def _patch(self, resource: str, found: Object, body: Object) -> Object:
        expected = body.get("metadata", {}).get("resourceVersion")
        if expected is not None and expected != found["metadata"]["resourceVersion"]:
            raise Failure(409, "Conflict", "the object has been modified; please apply your changes to the latest")
        new = merge(copy.deepcopy(found), body)
        self._validate(resource, new)
        new["metadata"]["generation"] += new["spec"] != found["spec"]
        return self.put(resource, new)

    def _validate(self, resource: str, body: Object) -> None:
        metadata = body["metadata"]
        group, _, _ = resource.rpartition("/")
        said = []
        if (body.get("apiVersion"), body.get("kind")) != (group, KINDS[resource]):
            said.append("apiVersion and kind are of something else")
        if not DNS_1035.fullmatch(metadata["name"]) or len(metadata["name"]) > 63:
            said.append(f"metadata.name: Invalid value: {metadata['name']!r}")
        said += [f"label {name}: {v!r}" for name, v in (metadata.get("labels") or {}).items() if not LABEL.fullmatch(v)]
        for owner in metadata.get("ownerReferences") or []:
            if not all(owner.get(key) for key in ("apiVersion", "kind", "name", "uid")):
                said.append(f"metadata.ownerReferences: {owner}")
        if resource == "ray.io/v1/rayclusters":
            said += crd_schemas.problems(body)
        if said:
            raise Failure(422, "Invalid", f'{resource} "{metadata["name"]}" is invalid: {"; ".join(said)}')

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        kube = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Nothing."""

            def _handle(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                kube.requests.append(f"{self.command} {self.path}")
                fault = kube.fault(self.command, self.path)
                if fault == "lost":
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    self._say(fault, Failure(fault, "Fault", "on demand").body)
                    return
                try:
                    code, said = kube.answer(self.command, self.path, self.headers, raw)
                except Failure as failure:
                    code, said = failure.code, failure.body
                if fault == "unanswered":
                    self.close_connection = True
                    return
                self._say(code, said)

            def _say(self, code: int, said: Object) -> None:
                with kube.lock:
                    body = json.dumps(said).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PATCH = do_DELETE = _handle

        return Handler


@contextmanager
def serving(rules: list[Object]) -> Iterator[FakeKube]:
    kube = FakeKube(rules)
    try:
        yield kube
    finally:
        kube.close()


def _split(path: str) -> tuple[str, str]:
    """Resource and name of /api/v1/namespaces/<ns>/pods[/<name>] or /apis/<group>/<version>/namespaces/..."""
    match = re.fullmatch(rf"/apis?/(.+)/namespaces/{NAMESPACE}/([a-z]+)(?:/([^/]+))?", path)
    assert match is not None, path
    assert path.startswith("/api/v1/") == (match[1] == "v1"), path
    return f"{match[1]}/{match[2]}", match[3] or ""


def _pairs(selector: str) -> list[tuple[str, str]]:
    return [tuple(one.split("=", 1)) for one in selector.split(",") if one]  # type: ignore[misc]


def _field(one: Object, path: str) -> Any:
    for part in path.split("."):
        one = one.get(part) or {}
    return one
