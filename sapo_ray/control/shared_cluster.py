"""The RayCluster that all jobs share, on Kubernetes: this service makes it and changes it.

    manifest, a ConfigMap --+
                            +--> what is written, if the manifest is not the one that was written last
    what is there now ------+

Ray's autoscaler writes into the same object (`replicas`, `workersToDelete`), inside a list that Kubernetes treats as
one value: whoever applies a manifest of its own meets conflicts there, or undoes what the autoscaler decided. So the
object is read, merged and written back under its resource version, and again if somebody else was quicker.

The manifest that was written last stands in an annotation: what it had and the new one has not goes, what neither has
is somebody else's and stays (defaults of the API server, what Kueue adds to pods).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from sapo_ray.control.kube.client import CONFIGMAPS, RAYCLUSTERS, Conflict, KubeClient, Rejected
from sapo_ray.errors import ConfigError, ResourceError

TRIES = 8
"""Writes that may meet somebody else's; the autoscaler writes once in some seconds."""
MANIFEST = "raycluster.json"
"""Key of the ConfigMap."""
WRITTEN = "sapo-ray.io/manifest"
"""Annotation: the manifest that was written last, as JSON."""

REDIS_FINALIZER = "ray.io/gcs-ft-redis-cleanup-finalizer"
"""With it KubeRay clears Redis before a cluster goes; it takes it away only from clusters that have a Redis."""
KUEUE = "kueue.x-k8s.io/"
QUEUE = KUEUE + "queue-name"
SHARED = frozenset({"labels", "annotations", "nodeSelector", "tolerations", "schedulingGates"})
"""Parts of a pod template to which others add, also where the manifest has no such part any more."""
IDENTITIES = ("groupName", "mountPath", "name")
"""By one of them the items of a list are told apart."""

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
    if owned and meta.get("annotations", {}).get(WRITTEN) == canonical(manifest):
        return "unchanged"
    body = merged(manifest, live, owners)
    try:
        done = api.replace(RAYCLUSTERS, name, body)
    except Rejected as error:
        if _kueue(live["metadata"]) == _kueue(body["metadata"]):
            raise
        raise Rejected(
            f"{error}; Kueue does not let a cluster that is there change its queue or way of scaling: pause the jobs, "
            f"`kubectl -n {manifest['metadata']['namespace']} delete raycluster {name}`, and it is made anew"
        ) from error
    if done is None:
        raise Conflict(f"RayCluster {name} was deleted meanwhile")
    return "changed"


def merged(manifest: Manifest, live: Mapping[str, Any], owners: list[dict[str, str]]) -> Manifest:
    """The manifest with what others decided: sizes of groups that scale themselves, suspension, finalizers, additions.

    `live` is not being deleted. Where it has no manifest that was written last, its spec is as if all of it had been.
    """
    body, before = stamped(manifest), written(live)
    meta, was = body["metadata"], live["metadata"]
    queues = [one["metadata"].get("labels", {}).get(QUEUE) for one in (before or live, manifest)]
    left = queues[0] is not None and queues[1] is None
    for key in ("labels", "annotations"):
        own = meta.get(key, {})
        found = three_way((before or {"metadata": {}})["metadata"].get(key), own, was.get(key, {}))
        meta[key] = {name: value for name, value in found.items() if name in own or not (left and KUEUE in name)}
    for key in ("resourceVersion", "uid"):
        if key in was:
            meta[key] = was[key]
    meta["ownerReferences"] = owners
    stood = live["spec"]
    spec = body["spec"] = three_way((before or live)["spec"] if not left else stood, body["spec"], stood)
    orphan = "" if "gcsFaultToleranceOptions" in spec else REDIS_FINALIZER
    if finalizers := [one for one in was.get("finalizers", []) if one != orphan]:
        meta["finalizers"] = finalizers
    if "suspend" in stood and not left:  # Kueue's, or somebody's who stopped the cluster by hand
        spec["suspend"] = stood["suspend"]
    groups = {group["groupName"]: group for group in stood.get("workerGroupSpecs", [])}
    for group in spec.get("workerGroupSpecs", []):
        group.pop("scaleStrategy", None)
        if (there := groups.get(group["groupName"])) and spec.get("enableInTreeAutoscaling"):
            replicas = there.get("replicas", group["minReplicas"])
            group["replicas"] = max(group["minReplicas"], min(group["maxReplicas"], replicas))
            if "scaleStrategy" in there:
                group["scaleStrategy"] = there["scaleStrategy"]
    return body


def three_way(before: Any, wanted: Any, live: Any, name: str = "") -> Any:
    """`wanted`, with what `live` has and neither `before` nor `wanted` knows. `name` is that of the part."""
    if isinstance(wanted, dict) and isinstance(live, dict):
        old: Any = before if isinstance(before, dict) else {}
        found = {key: three_way(old.get(key), value, live.get(key), key) for key, value in wanted.items()}
        for key in (key for key in live if key not in wanted):
            if key not in old:
                found[key] = copy.deepcopy(live[key])
            elif key in SHARED and (rest := three_way(old[key], type(live[key])(), live[key], key)):
                found[key] = rest
        return found
    if isinstance(wanted, list) and isinstance(live, list):
        old = before if isinstance(before, list) else []
        if name in SHARED:
            return wanted + [one for one in live if one not in wanted and one not in old]
        tables = (_table(old), _table(wanted), _table(live))
        if None not in tables:
            return list(three_way(*tables).values())
    return copy.deepcopy(wanted)


def _table(items: list[Any]) -> dict[str, Any] | None:
    """Items by what tells them apart, if something does."""
    for key in IDENTITIES:
        found = {one[key]: one for one in items if isinstance(one, dict) and key in one}
        if len(found) == len(items):
            return found
    return None


def _kueue(meta: Mapping[str, Any]) -> dict[str, str]:
    return {k: v for key in ("labels", "annotations") for k, v in meta.get(key, {}).items() if k.startswith(KUEUE)}


def stamped(manifest: Manifest) -> Manifest:
    """The manifest with itself in it."""
    body = copy.deepcopy(manifest)
    body["metadata"].setdefault("annotations", {})[WRITTEN] = canonical(manifest)
    return body


def written(live: Mapping[str, Any]) -> Manifest | None:
    """The manifest that was written last; None where that is not known."""
    try:
        found = json.loads(live["metadata"].get("annotations", {}).get(WRITTEN, ""))
    except ValueError:
        return None
    return dict(found) if isinstance(found, dict) else None


def canonical(manifest: Manifest) -> str:
    """The same text for the same manifest."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"))


def manifest_of(api: KubeClient, name: str) -> Manifest:
    """The manifest in the ConfigMap `name`, as the API server has it now: a mounted one may be of the release before.

    Raises ConfigError: there is no such ConfigMap, or no RayCluster with name and namespace in it.
    """
    found = api.get(CONFIGMAPS, name)
    if found is None:
        raise ConfigError(f"there is no ConfigMap {name} in namespace {api.namespace}")
    try:
        manifest = json.loads(found["data"][MANIFEST])
        if manifest["kind"] != "RayCluster" or not all(manifest["metadata"][key] for key in ("name", "namespace")):
            raise KeyError("kind RayCluster, metadata.name, metadata.namespace")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{MANIFEST} in ConfigMap {name} is not the JSON manifest of a RayCluster: {type(error).__name__}: {error}"
        ) from error
    return dict(manifest)


def _owner(api: KubeClient, name: str) -> dict[str, str]:
    found = api.get(CONFIGMAPS, name)
    if found is None:
        raise ResourceError(f"the ConfigMap {name} that the RayCluster is to go with is not there")
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": found["metadata"]["uid"]}
