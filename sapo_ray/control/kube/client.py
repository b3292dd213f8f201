"""The Kubernetes API over HTTP, as far as it is needed here: six verbs and a question, bounded; errors say what to do.

    no connection, not JSON      --> LauncherUnavailable: the server is away, asked again in the next round
    401, 403, 429, 5xx           --> ClusterUnavailable: so for this one request; what others ask may be granted
    403 by a quota               --> QuotaUsedUp
    403 by an admission policy   --> Rejected
    400, 422                     --> Rejected: the object is wrong, asking again would change nothing
    409                          --> Conflict: read it again and decide anew
    404 of an object             --> None; of a kind that the server does not know: ClusterUnavailable

Nothing is watched: who asks, asks again a second later, and what it finds is the whole truth.
"""

from __future__ import annotations

import os
import re
import ssl
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from sapo_ray.control import answers
from sapo_ray.control.launcher import CALL_S, CONNECT_S, ClusterUnavailable, LauncherUnavailable
from sapo_ray.errors import ConfigError, SapoRayError

MOST_BYTES = 64 << 20
"""Largest answer that is read: a list of a thousand pods has some 15 MB."""
MERGE_PATCH = "application/merge-patch+json"
DENIED = re.compile("denied (the )?request")
"""In the answers of admission webhooks and of ValidatingAdmissionPolicies; rights and quotas are told otherwise."""
QUOTA = "exceeded quota"

RAYCLUSTERS = "ray.io/v1/rayclusters"
NETWORKPOLICIES = "networking.k8s.io/v1/networkpolicies"
DEPLOYMENTS = "apps/v1/deployments"
PODS, SECRETS, EVENTS, CONFIGMAPS = "v1/pods", "v1/secrets", "v1/events", "v1/configmaps"

REVIEWS = "authorization.k8s.io/v1", "SelfSubjectAccessReview"

Object = dict[str, Any]


class Conflict(SapoRayError):
    """There is one of that name already, or it was changed since it was read."""


class Rejected(SapoRayError):
    """The server holds the object to be wrong, or a policy of the cluster forbids it."""


class QuotaUsedUp(ClusterUnavailable):
    """A ResourceQuota has no room for the object now."""


class _TokenFile(httpx.Auth):
    """Reads the token for every request: the kubelet writes a new one every hour."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        try:
            token = self._path.read_text().strip()
        except FileNotFoundError:
            token = ""
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        yield request


class _KnownAuthority(httpx.BaseTransport):
    """Connections to a server whose authority stands in a file, which Kubernetes writes again when that is renewed.

    From then on connections are made anew by the new one; calls that are under way go on.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._read: tuple[int, int] | None = None
        self._made: list[httpx.HTTPTransport] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Raises OSError if the file is none of certificates."""
        return self._newest().handle_request(request)

    def close(self) -> None:
        for one in self._made:
            one.close()

    def _newest(self) -> httpx.HTTPTransport:
        with self._lock:
            found = self._path.stat()
            version = (found.st_ino, found.st_mtime_ns)
            if version != self._read:
                known = ssl.create_default_context(cafile=str(self._path))
                self._made.append(httpx.HTTPTransport(verify=known, trust_env=False))
                self._read = version
            return self._made[-1]


class KubeClient:
    """One namespace of one API server. Safe for use by several threads.

    Args:
        url: of the API server.
        account: folder with `token`, `ca.crt` and `namespace`, as a pod has it.
        namespace: instead of the account's.
    """

    def __init__(self, url: str, account: Path, namespace: str = "") -> None:
        self.namespace = namespace or _namespace(account)
        ca = account / "ca.crt"
        self._http = httpx.Client(
            base_url=url,
            auth=_TokenFile(account / "token"),
            transport=_KnownAuthority(ca) if ca.is_file() else None,
            verify=url.startswith("https:"),
            timeout=httpx.Timeout(CALL_S, connect=CONNECT_S),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, resource: str, name: str) -> Object | None:
        """One object, e.g. `get("ray.io/v1/rayclusters", "a")`; None if there is none of that name."""
        return self._call("GET", self._path(resource, name), absent=name)

    def find(self, resource: str, **query: str) -> list[Object]:
        """Objects of a kind; `query` as the API calls it, e.g. labelSelector, fieldSelector, limit."""
        answer = self._call("GET", self._path(resource), params=query)
        items: list[Object] = (answer or {}).get("items") or []
        return items

    def create(self, resource: str, body: Object) -> Object:
        """A new object, as the server has it. Raises Conflict, Rejected."""
        return self._call("POST", self._path(resource), json=body) or {}

    def patch(self, resource: str, name: str, body: Object) -> Object | None:
        """Merge `body` into an object; None if it is gone. Raises Conflict, Rejected.

        With metadata.resourceVersion in `body` only the object that was read is changed, else Conflict is raised.
        """
        return self._call("PATCH", self._path(resource, name), json=body, absent=name)

    def replace(self, resource: str, name: str, body: Object) -> Object | None:
        """An object as a whole, if it is still the one whose metadata.resourceVersion `body` has; None if it is gone.

        Raises Conflict, Rejected.
        """
        return self._call("PUT", self._path(resource, name), json=body, absent=name)

    def delete(self, resource: str, name: str) -> None:
        """Delete an object and what it owns, in the background; nothing if it is gone."""
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        self._call("DELETE", self._path(resource, name), json=options, absent=name)

    def may(self, verb: str, resource: str, name: str = "") -> bool:
        """Whether this account has a right in its namespace. Every account may ask this, unless somebody forbade it."""
        group, _, kind = resource.rpartition("/")
        right = {"verb": verb, "group": group.rpartition("/")[0], "resource": kind, "namespace": self.namespace}
        version, review = REVIEWS
        body = {
            "apiVersion": version,
            "kind": review,
            "spec": {"resourceAttributes": right | ({"name": name} if name else {})},
        }
        answer = self._call("POST", f"/apis/{version}/{review.lower()}s", json=body) or {}
        return (answer.get("status") or {}).get("allowed") is True

    def _path(self, resource: str, name: str = "") -> str:
        """`v1/pods`, `ray.io/v1/rayclusters` and the like are kinds; core ones have no group."""
        group, _, kind = resource.rpartition("/")
        root = "/api/" if group == "v1" else "/apis/"
        return f"{root}{group}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def _call(
        self,
        method: str,
        path: str,
        *,
        json: Object | None = None,
        params: Mapping[str, str] | None = None,
        absent: str = "",
    ) -> Object | None:
        headers = {"Content-Type": MERGE_PATCH} if method == "PATCH" else {}
        try:
            with self._http.stream(method, path, json=json, params=params, headers=headers) as coming:
                answer = answers.read(coming, MOST_BYTES)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, answers.TooLarge) as error:
            raise LauncherUnavailable(
                f"the Kubernetes API at {answers.shown(self._http.base_url)} cannot be asked "
                f"({type(error).__name__}: {error}); does a network policy stop it (networkPolicy.kubeApi)?"
            ) from error
        try:
            said = answer.json()
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise LauncherUnavailable(
                f"{method} {path} answered {answer.status_code}: {answers.last_line(answer.text)}"
            )
        if answer.is_success:
            return said
        if not _is_absent(answer.status_code, said, absent):
            raise _failure(f"{method} {path}", answer.status_code, said)
        return None


def in_cluster_url() -> str:
    """The API server as a pod finds it. Raises ConfigError outside of one."""
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if not host:
        raise ConfigError(
            "SAPO_KUBE_URL must name the Kubernetes API where the service does not run in a pod, e.g. "
            "http://127.0.0.1:8001 of `kubectl proxy`"
        )
    return f"https://{f'[{host}]' if ':' in host else host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"


def _namespace(account: Path) -> str:
    try:
        return (account / "namespace").read_text().strip()
    except OSError:
        raise ConfigError(
            f"SAPO_KUBE_NAMESPACE must name the namespace of the jobs' clusters: {account}/namespace cannot be read"
        ) from None


def _is_absent(code: int, said: Object, name: str) -> bool:
    """Whether an object is not there; a kind that the server does not know has no name in its answer."""
    return code == 404 and bool(name) and (said.get("details") or {}).get("name") == name


def _failure(what: str, code: int, said: Object) -> SapoRayError:
    message = f"{what} answered {code} {said.get('reason', '')}: {str(said.get('message', ''))[:1000]}"
    if code == 409:
        return Conflict(message)
    if code in (400, 422) or (code == 403 and DENIED.search(message)):
        return Rejected(message)
    if code == 403 and QUOTA in message:
        return QuotaUsedUp(message)
    hints = {
        401: "; is the service account's token mounted, and its own?",
        403: "; the service's Role must grant this, as the chart's does",
        404: "; is the KubeRay operator installed, with its custom resources?",
    }
    return ClusterUnavailable(message + hints.get(code, ""))
