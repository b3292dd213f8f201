"""What talks to what: everything else is denied."""

from __future__ import annotations

import itertools

import pytest
from chart_rendering import FEATURES, Object, one, overlaid, ray_cluster, render
from network_rules import Place, passes

MONITORING = Place(name="prometheus", labels={"app": "prometheus"}, namespace="monitoring")
STRANGER = Place(name="stranger", labels={"app": "shop"}, namespace="shop")
NEIGHBOUR = Place(name="neighbour", labels={"app": "notebook"})
DNS = Place(name="dns", labels={"k8s-app": "kube-dns"}, namespace="kube-system")
HUB = Place(name="hub", address="1.2.3.4")
METADATA = Place(name="metadata", address="169.254.169.254")
INTERNAL = Place(name="internal", address="10.20.30.40")
API = Place(name="api", address="10.0.0.1")
POSTGRES = Place(name="postgres", labels={"app": "postgres"}, namespace="db", address="10.9.0.1")


def places(values: Object) -> tuple[list[Object], dict[str, Place]]:
    """The policies, and the pods with the labels that they come to have: those of groups, and KubeRay's own."""
    objects = render(values)
    cluster = ray_cluster(objects)
    made = {"ray.io/cluster": cluster["metadata"]["name"]}
    found = {
        "control": Place(name="control", labels=one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]),
        "test": Place(name="test", labels=one(objects, "Pod")["metadata"]["labels"]),
    }
    head = cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    found["head"] = Place(name="head", labels=head | made | {"ray.io/node-type": "head"})
    found["cleanup"] = Place(name="cleanup", labels=head | made | {"ray.io/node-type": "redis-cleanup"})
    for group in cluster["spec"]["workerGroupSpecs"]:
        labels = group["template"]["metadata"]["labels"] | group["labels"] | made
        name = group["groupName"]
        found[name] = Place(name=name, labels=labels | {"ray.io/node-type": "worker", "ray.io/group": name})
    return [thing for thing in objects if thing["kind"] == "NetworkPolicy"], found


def test_nothing_talks_to_anything_but_what_is_listed() -> None:
    policies, pods = places({"networkPolicy": {"kubeApi": {"cidrs": ["10.0.0.1/32"]}}})
    others = {place.name: place for place in (MONITORING, STRANGER, NEIGHBOUR, DNS, HUB, METADATA, INTERNAL, API)}
    everybody = pods | others
    ports = (22, 53, 80, 443, 5432, 6379, 6443, 8265, 8800, 8801, 10001, 29500)
    seen = {
        (source, target, port)
        for source, target in itertools.permutations(everybody, 2)
        for port in ports
        if (source in pods or target in pods) and passes(policies, everybody[source], everybody[target], port)
    }
    ray = ("head", "rollout", "learner", "verifier", "cleanup")
    assert seen == {
        *((a, b, port) for a, b in itertools.permutations(ray, 2) for port in ports),
        *((pod, "dns", 53) for pod in pods),
        *((pod, "api", port) for pod in ("control", "head") for port in (443, 6443)),
        ("control", "head", 8265),
        ("head", "control", 8800),
        ("test", "control", 8800),
        ("test", "head", 8265),
        ("neighbour", "control", 8800),
        ("prometheus", "control", 8801),
    }


def test_a_narrow_address_of_the_api_server_shuts_the_rest() -> None:
    policies, pods = places({"networkPolicy": {"kubeApi": {"cidrs": ["10.0.0.1/32"], "ports": [443]}}})
    assert passes(policies, pods["head"], API, 443)
    assert not passes(policies, pods["head"], HUB, 443)
    assert not passes(policies, pods["control"], METADATA, 443)


def test_only_the_named_roles_reach_the_internet_and_none_the_networks_inside() -> None:
    values = {"networkPolicy": {"internetFor": ["rollout"], "kubeApi": {"cidrs": ["10.0.0.1/32"]}}}
    policies, pods = places(values)
    reached = {name for name, pod in pods.items() if passes(policies, pod, HUB, 443)}
    assert reached == {"rollout"}
    assert not any(passes(policies, pods["rollout"], place, 443) for place in (METADATA, INTERNAL))
    assert not passes(policies, pods["rollout"], HUB, 22)


def test_where_nothing_scales_and_the_cluster_is_the_releases_nobody_asks_the_api_server() -> None:
    policies, pods = places(overlaid(FEATURES["static"], FEATURES["fixed_size"]))
    assert not any(passes(policies, pods[name], API, 443) for name in ("control", "head"))


@pytest.mark.parametrize("port", [5432, 6379])
def test_the_database_is_the_services_and_redis_the_heads(port: int) -> None:
    policies, pods = places(overlaid(FEATURES["postgresql"], FEATURES["redis"]))
    reached = {name for name, pod in pods.items() if passes(policies, pod, POSTGRES, port)}
    assert reached == ({"control"} if port == 5432 else {"head", "cleanup"})


def test_a_database_that_is_named_is_the_only_one() -> None:
    where = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "db"}}}
    policies, pods = places(overlaid(FEATURES["postgresql"], {"networkPolicy": {"database": {"to": [where]}}}))
    assert passes(policies, pods["control"], POSTGRES, 5432)
    assert not passes(policies, pods["control"], STRANGER, 5432)


@pytest.mark.parametrize(("address", "port", "reached"), [("redis.db:6380", 0, 6380), ("redis.db:6380", 6379, 6379)])
def test_redis_is_reached_at_the_port_of_its_address_unless_its_pods_have_another(
    address: str, port: int, reached: int
) -> None:
    values = {"ray": {"gcsFaultTolerance": {"redisAddress": address}}, "networkPolicy": {"redis": {"port": port}}}
    policies, pods = places(overlaid(FEATURES["redis"], values))
    assert [one for one in (6379, 6380) if passes(policies, pods["head"], POSTGRES, one)] == [reached]


@pytest.mark.parametrize(
    ("url", "port"),
    [("http://head.ray.svc:8265", 8265), ("https://ray.example.com", 443), ("http://10.9.0.1/ray", 80)],
)
def test_a_cluster_of_ones_own_is_reached_at_its_port_by_the_service_and_its_test(url: str, port: int) -> None:
    objects = render({"ray": {"mode": "external", "external": {"jobsUrl": url}}})
    policies = [thing for thing in objects if thing["kind"] == "NetworkPolicy"]
    for pod in (one(objects, "Deployment")["spec"]["template"], one(objects, "Pod")):
        place = Place(name="own", labels=pod["metadata"]["labels"])
        assert [one for one in (22, 80, 443, 8265) if passes(policies, place, POSTGRES, one)] == [port]


def test_dns_may_have_another_port() -> None:
    policies, pods = places({"networkPolicy": {"dnsPorts": [5353]}})
    for protocol in ("UDP", "TCP"):
        reached = [one for one in (53, 5353) if passes(policies, pods["rollout"], DNS, one, protocol)]
        assert reached == [5353]


def test_an_ingress_controller_is_let_in_where_there_is_an_ingress() -> None:
    where = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}}}]
    without, pods = places({"networkPolicy": {"ingressFrom": where}})
    assert not passes(without, STRANGER, pods["control"], 8800)
    policies, pods = places(overlaid(FEATURES["ingress"], {"networkPolicy": {"ingressFrom": where}}))
    assert passes(policies, STRANGER, pods["control"], 8800)
    assert not passes(policies, STRANGER, pods["control"], 8801)
    assert not passes(policies, STRANGER, pods["head"], 8265)


def test_pods_of_another_release_are_strangers() -> None:
    policies, pods = places({})
    other = {**pods["head"].labels, "ray.io/cluster": "other-sapo-ray-cluster", "app.kubernetes.io/instance": "other"}
    head = Place(name="other", labels=other)
    assert not passes(policies, head, pods["head"], 6379)
    assert not passes(policies, head, pods["control"], 8801)
