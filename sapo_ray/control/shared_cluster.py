"""The RayCluster that all jobs share, on Kubernetes: this service makes it and changes it.

    manifest, a file ------+
                           +--> what is written, if the manifest is not the one that was written last
    what is there now -----+

Ray's autoscaler writes into the same object (`replicas`, `workersToDelete`), inside a list that Kubernetes treats as
one value: whoever applies a manifest of its own meets conflicts there, or undoes what the autoscaler decided. So the
object is read, merged and written back under its resource version, and again if somebody else was quicker.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from sapo_ray.errors import ConfigError, ResourceError

CALL_S = 20.0
"""Bound of one call of the API server."""
TRIES = 8
"""Writes that may meet somebody else's; the autoscaler writes once in some seconds."""
POD_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes lays a pod's token and the certificate of its API server."""
WRITTEN = "sapo-ray.io/manifest"
"""Annotation: fingerprint of the manifest that was written last."""
COLLECTION = "/apis/ray.io/v1/namespaces/{namespace}/rayclusters"

Outcome = Literal["created", "changed", "unchanged"]
Manifest = dict[str, Any]


class ApiServer:
    """A Kubernetes API server as a pod sees it: one token, one certificate authority."""

    def __init__(self, url: str, *, token: str, authority: Path) -> None:
        context = ssl.create_default_context(cafile=str(authority))
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            verify=context,
            timeout=CALL_S,
            trust_env=False,
        )

    @classmethod
    def of_this_pod(cls, account: Path | None = None) -> ApiServer:
        """Raises ConfigError outside a pod, or in one without an account."""
        account = account or POD_ACCOUNT
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT_HTTPS", "443")
        try:
            token = (account / "token").read_text().strip()
        except OSError as error:
            raise ConfigError(f"no account of a pod in {account} ({error}); this runs in a pod of the chart") from error
        if not host:
            raise ConfigError("KUBERNETES_SERVICE_HOST is not set; this runs in a pod of the chart")
        shown = f"[{host}]" if ":" in host else host
        return cls(f"https://{shown}:{port}", token=token, authority=account / "ca.crt")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, method: str, path: str, body: Manifest | None = None) -> httpx.Response:
        """The answer, whatever its status but those that no repetition mends. Raises ResourceError."""
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ResourceError(
                f"the API server cannot be reached ({type(error).__name__}: {error}); does a network policy stop it "
                "(networkPolicy.kubeApi)?"
            ) from error
        if answer.is_success or answer.status_code in (404, 409):
            return answer
        raise ResourceError(f"{method} {path} answered {answer.status_code}: {_reason(answer)}")


def apply(api: ApiServer, manifest: Manifest, owner: str) -> Outcome:
    """Bring the cluster to its manifest, and leave to the autoscaler what is the autoscaler's.

    `owner` is the ConfigMap in the manifest's namespace with which the cluster goes.

    Raises ResourceError: the API server refused, is away, or somebody else wrote at each of TRIES tries.
    """
    namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
    path = COLLECTION.format(namespace=namespace)
    for _ in range(TRIES):
        found = api.ask("GET", f"{path}/{name}")
        if found.status_code == 404:
            body = stamped(manifest)
            body["metadata"]["ownerReferences"] = [_owner(api, namespace, owner)]
            answer = api.ask("POST", path, body)
            if answer.status_code == 404:
                raise ResourceError("the API server knows no RayCluster; install the KubeRay operator with its CRDs")
            outcome: Outcome = "created"
        else:
            live = found.json()
            if live["metadata"].get("annotations", {}).get(WRITTEN) == fingerprint(manifest):
                return "unchanged"
            answer = api.ask("PUT", f"{path}/{name}", merged(stamped(manifest), live))
            outcome = "changed"
        if answer.is_success:
            return outcome
    raise ResourceError(f"RayCluster {name} was changed by somebody else at each of {TRIES} tries; try again")


def merged(manifest: Manifest, live: Mapping[str, Any]) -> Manifest:
    """The manifest with what others decided: sizes of groups that scale themselves, suspension, owners, finalizers."""
    body = copy.deepcopy(manifest)
    meta, was = body["metadata"], live["metadata"]
    for key in ("labels", "annotations"):
        meta[key] = {**was.get(key, {}), **meta.get(key, {})}
    for key in ("resourceVersion", "uid", "ownerReferences", "finalizers"):
        if key in was:
            meta[key] = was[key]
    spec, stood = body["spec"], live["spec"]
    if "suspend" in stood:  # Kueue's
        spec["suspend"] = stood["suspend"]
    if spec.get("enableInTreeAutoscaling"):
        groups = {group["groupName"]: group for group in stood.get("workerGroupSpecs", [])}
        for group in spec.get("workerGroupSpecs", []):
            if before := groups.get(group["groupName"]):
                replicas = before.get("replicas", group["minReplicas"])
                group["replicas"] = max(group["minReplicas"], min(group["maxReplicas"], replicas))
                if "scaleStrategy" in before:
                    group["scaleStrategy"] = before["scaleStrategy"]
    return body


def stamped(manifest: Manifest) -> Manifest:
    """The manifest with its own fingerprint in it."""
    body = copy.deepcopy(manifest)
    body["metadata"].setdefault("annotations", {})[WRITTEN] = fingerprint(manifest)
    return body


def fingerprint(manifest: Manifest) -> str:
    """Of all that the manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:32]


def read_manifest(path: Path) -> Manifest:
    """Raises ConfigError: not a RayCluster with name and namespace."""
    try:
        found = json.loads(path.read_text())
        if found["kind"] != "RayCluster" or not all(found["metadata"][key] for key in ("name", "namespace")):
            raise KeyError("kind RayCluster, metadata.name, metadata.namespace")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the JSON manifest of a RayCluster: {type(error).__name__}: {error}"
        ) from error
    return dict(found)


def _owner(api: ApiServer, namespace: str, name: str) -> dict[str, str]:
    answer = api.ask("GET", f"/api/v1/namespaces/{namespace}/configmaps/{name}")
    if not answer.is_success:
        raise ResourceError(f"the ConfigMap {name} that the RayCluster is to go with is not there")
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": answer.json()["metadata"]["uid"]}


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])[:2000]
    except (ValueError, KeyError, TypeError):
        return answer.text[:500]
