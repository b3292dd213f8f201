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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from sapo_ray.control.kube.client import CONFIGMAPS, RAYCLUSTERS, Conflict, KubeClient
from sapo_ray.errors import ConfigError, ResourceError

TRIES = 8
"""Writes that may meet somebody else's; the autoscaler writes once in some seconds."""
WRITTEN = "sapo-ray.io/manifest"
"""Annotation: fingerprint of the manifest that was written last."""

REDIS_FINALIZER = "ray.io/gcs-ft-redis-cleanup-finalizer"
"""With it KubeRay clears Redis before a cluster goes; it takes it away only from clusters that have a Redis."""

Outcome = Literal["created", "changed", "unchanged"]
Manifest = dict[str, Any]


def apply(api: KubeClient, manifest: Manifest, owner: str) -> Outcome:
    """Bring the cluster to its manifest, and leave to the autoscaler what is the autoscaler's.

    `owner` is the ConfigMap in the manifest's namespace with which the cluster goes.

    Raises ResourceError: it is being deleted, or somebody else wrote at each of TRIES tries; what KubeClient raises.
    """
    for _ in range(TRIES):
        with suppress(Conflict):
            return _tried(api, manifest, owner)
    name = manifest["metadata"]["name"]
    raise ResourceError(f"RayCluster {name} was changed by somebody else at each of {TRIES} tries; try again")


def _tried(api: KubeClient, manifest: Manifest, owner: str) -> Outcome:
    """Raises Conflict: somebody else was quicker."""
    name, owners = manifest["metadata"]["name"], [_owner(api, owner)]
    live = api.get(RAYCLUSTERS, name)
    if live is None:
        body = stamped(manifest)
        body["metadata"]["ownerReferences"] = owners
        api.create(RAYCLUSTERS, body)
        return "created"
    meta = live["metadata"]
    if "deletionTimestamp" in meta:
        raise ResourceError(f"RayCluster {name} is being deleted, and can be made anew once it is gone; try again")
    # That of an earlier release goes at any moment with the ConfigMap that it belonged to, unless it gets this one.
    owned = {one.get("uid") for one in meta.get("ownerReferences", [])} == {owners[0]["uid"]}
    if owned and meta.get("annotations", {}).get(WRITTEN) == fingerprint(manifest):
        return "unchanged"
    if api.replace(RAYCLUSTERS, name, merged(stamped(manifest), live, owners)) is None:
        raise Conflict(f"RayCluster {name} was deleted meanwhile")
    return "changed"


def merged(manifest: Manifest, live: Mapping[str, Any], owners: list[dict[str, str]]) -> Manifest:
    """The manifest with what others decided: sizes of groups that scale themselves, suspension, finalizers.

    `live` is not being deleted.
    """
    body = copy.deepcopy(manifest)
    meta, was = body["metadata"], live["metadata"]
    for key in ("labels", "annotations"):
        meta[key] = {**was.get(key, {}), **meta.get(key, {})}
    for key in ("resourceVersion", "uid"):
        if key in was:
            meta[key] = was[key]
    meta["ownerReferences"] = owners
    spec, stood = body["spec"], live["spec"]
    orphan = "" if "gcsFaultToleranceOptions" in spec else REDIS_FINALIZER
    if finalizers := [one for one in was.get("finalizers", []) if one != orphan]:
        meta["finalizers"] = finalizers
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


def _owner(api: KubeClient, name: str) -> dict[str, str]:
    found = api.get(CONFIGMAPS, name)
    if found is None:
        raise ResourceError(f"the ConfigMap {name} that the RayCluster is to go with is not there")
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": found["metadata"]["uid"]}
