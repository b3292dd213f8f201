"""The chart over a matrix of values: it lints, renders, and every object is one that Kubernetes and KubeRay take."""

from __future__ import annotations

import itertools
import json
from typing import Any

import crd_schemas
import kube_schemas
import pytest
from chart_rendering import (
    ALL_ON,
    ALL_ON_PER_JOB,
    CHART,
    CONTRADICTIONS,
    EXAMPLES,
    FEATURES,
    Object,
    Refused,
    example,
    helm,
    overlaid,
    pod_templates,
    ray_cluster,
    render,
)

SINGLES: dict[str, Object] = {
    "defaults": {},
    **{f"example {name}": example(name) for name in EXAMPLES},
    **{f"feature {name}": values for name, values in FEATURES.items()},
    "all on": overlaid(*(FEATURES[name] for name in ALL_ON)),
    "all on per job": overlaid(*(FEATURES[name] for name in ALL_ON_PER_JOB)),
}
_SEEN: set[tuple[str, str]] = set()


def check(objects: list[Object], version: str) -> None:
    """Every object and every pod template against its schema; what was seen before is not looked at again."""
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for _, template in pod_templates(objects)]
    found = []
    for thing in [*objects, *pods, *applied(objects)]:
        if thing["kind"] == "RayCluster" and not crd_schemas.has_crds():
            continue
        key = (version, json.dumps(thing, sort_keys=True))
        if key not in _SEEN:
            found += kube_schemas.problems(thing, version)
            _SEEN.add(key)
    assert not found, "\n".join(found)


def applied(objects: list[Object]) -> list[Object]:
    """The RayCluster, if it is the service that makes it."""
    kept = {"raycluster.json", "job-cluster.json"}
    manifests = [one for one in objects if one["kind"] == "ConfigMap" and kept & one["data"].keys()]
    return [ray_cluster(objects)] if manifests else []


def test_the_chart_lints() -> None:
    found = helm.lint(CHART)
    assert [one for one in found["messages"] if one["severity"] > 1] == []


@pytest.mark.parametrize("name", SINGLES)
def test_every_object_is_valid_in_the_oldest_and_the_newest_kubernetes(name: str) -> None:
    objects = render(SINGLES[name])
    assert len(objects) >= 8
    for version in (kube_schemas.OLDEST, kube_schemas.NEWEST):
        check(objects, version)


def test_every_pair_of_features_renders_or_contradicts() -> None:
    refused = set()
    for pair in itertools.combinations(FEATURES, 2):
        if frozenset(pair) == {"external", "static"}:
            continue  # two values of one setting
        try:
            objects = render(overlaid(*(FEATURES[name] for name in pair)))
        except Refused:
            refused.add(frozenset(pair))
        else:
            check(objects, kube_schemas.NEWEST)
    assert refused == CONTRADICTIONS - {frozenset({"external", "static"})}


def test_kuberays_schema_was_at_hand() -> None:
    if not crd_schemas.has_crds():
        pytest.skip("no ../shared/crds beside this checkout: RayClusters were validated by their pods' schemas alone")
    broken = ray_cluster(render())
    broken["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert any("minReplica" in problem for problem in kube_schemas.problems(broken))


def test_a_kind_without_schema_is_an_error_and_an_unknown_field_too() -> None:
    with pytest.raises(LookupError):
        kube_schemas.problems({"apiVersion": "v1", "kind": "Nonsense"})
    service: dict[str, Any] = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"port": 1}}
    assert kube_schemas.problems(service)


@pytest.mark.parametrize("name", ["defaults", "example laptop", "all on", "all on per job"])
def test_no_two_objects_have_one_name_and_all_are_in_the_namespace(name: str) -> None:
    objects = render(SINGLES[name])
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    assert {one["metadata"]["namespace"] for one in objects} == {"rl"}
