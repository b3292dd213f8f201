"""From a submission to a driver in a cluster of its own, whatever happens on the way."""

from __future__ import annotations

from typing import Any

import crd_schemas
import pytest
from fake_operator import SECRETS
from kube_world import JOB, KubeWorld, documented, request

from sapo_ray.control.kube import KubeClusters, rights
from sapo_ray.control.kube.making import Options
from sapo_ray.control.launcher import LauncherUnavailable, LaunchRefused, NotStarted

NAME = f"sapo-{JOB}-1"


def waits(launcher: KubeClusters, **over: Any) -> str:
    """Why a driver is not started yet."""
    with pytest.raises(NotStarted) as caught:
        launcher.submit(request(**over))
    return str(caught.value)


def start(kube: KubeWorld, launcher: KubeClusters, **over: Any) -> None:
    """Submit as the reconciler does, round after round, until the driver is started."""
    for _ in range(10):
        try:
            launcher.submit(request(**over))
            return
        except (NotStarted, LauncherUnavailable):
            kube.operator.work()
    pytest.fail("the driver was not started")


def test_a_driver_is_started_once_the_nodes_it_needs_are_ready(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    assert waits(launcher) == (
        "the job's cluster is being made: head: 0 of 1 ready, no pod yet for the others; "
        "rollout: 0 of 1 ready, no pod yet for the others; learner: 0 of 1 ready, no pod yet for the others; "
        "verifier: 0 of 1 ready, no pod yet for the others"
    )
    assert launcher.status(NAME).state == "UNKNOWN"
    kube.operator.work()
    launcher.submit(request())
    assert launcher.status(NAME).state == "RUNNING"
    driver = kube.heads.drivers[NAME]
    assert driver["entrypoint"] == (
        f"python -m sapo_ray.driver.main --job {JOB} --attempt 1 --control http://control:8800 "
        f"--token-file /data/runs/{JOB}/.token-1"
    )
    assert launcher.logs(NAME) == f"log of {NAME}"


@pytest.mark.skipif(not crd_schemas.has_crds(), reason="KubeRay's CRDs are not beside the repository")
def test_the_schema_of_kuberay_is_asked(kube: KubeWorld) -> None:
    template = documented("apiVersion")
    template["spec"]["headGroupSpec"]["rayStartParams"] = {"num-cpus": 0}
    kube.write(template)
    with pytest.raises(LaunchRefused, match=r"rayStartParams.num-cpus: 0 is not of type 'string'") as caught:
        kube.launcher().submit(request())
    assert caught.value.told == "the cluster refused to start the driver; the service's log says why"


@pytest.mark.parametrize(
    ("obstacle", "told"),
    [
        (
            {"nodes": 1},
            "rollout: 0 of 1 ready, 2 Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        ),
        ({"waiting": {"learner": "ImagePullBackOff"}}, "is being made: learner: 0 of 1 ready, 1 ImagePullBackOff"),
        ({"waiting": {"headgroup": "CrashLoopBackOff"}}, "is being made: head: 0 of 1 ready, 1 CrashLoopBackOff"),
        ({"complaint": ("InvalidRayClusterSpec", "of registry.internal")}, "(InvalidRayClusterSpec)"),
        (
            {"complaint": ("FailedToCreateHeadPod", "exceeded quota: team")},
            "(FailedToCreateHeadPod: a quota of Kubernetes is used up)",
        ),
        (
            {"most_pods": 3},
            "verifier: 0 of 1 ready, no pod yet for the others "
            "(FailedToCreateWorkerPod: a quota of Kubernetes is used up)",
        ),
        ({"unmounted": "learner"}, "is being made: learner: 0 of 1 ready, 1 Pending (FailedMount)"),
    ],
)
def test_the_tenant_is_told_what_kubernetes_says(kube: KubeWorld, obstacle: dict[str, Any], told: str) -> None:
    launcher = kube.launcher()
    waits(launcher)
    for name, value in obstacle.items():
        setattr(kube.operator, name, value)
    kube.operator.work()
    reason = waits(launcher)
    assert told in reason
    assert "registry.internal" not in reason
    assert "team" not in reason


def test_a_cluster_that_is_not_ready_is_looked_at_every_five_seconds(kube: KubeWorld) -> None:
    launcher = kube.launcher(look_every_s=Options(template=kube.template, secret="s").look_every_s)
    told = waits(launcher)
    asked = len(kube.kube.requests)
    kube.operator.work()
    kube.ahead = 4.0
    assert waits(launcher) == told
    assert len(kube.kube.requests) == asked
    kube.ahead = 6.0
    launcher.submit(request())
    assert kube.heads.submissions == [NAME]


def test_a_suspended_cluster_waits_without_a_deadline_and_has_all_of_it_afterwards(kube: KubeWorld) -> None:
    template = documented("apiVersion")
    template["spec"]["suspend"] = True
    kube.write(template)
    launcher = kube.launcher(deadline_s=60)
    kube.ahead = 1e6
    assert waits(launcher) == "the cluster waits in a queue of Kubernetes (it is suspended)"
    with kube.kube.lock:
        cluster = kube.clusters()[NAME]
        cluster["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
        admitted = {"type": "RayClusterSuspended", "status": "False", "lastTransitionTime": "2100-01-01T00:00:00Z"}
        cluster["spec"]["suspend"], cluster["status"] = False, {"conditions": [admitted]}
    kube.ahead = 0
    assert "is being made" in waits(launcher)


def test_a_cluster_that_is_not_ready_in_time_fails_its_job_and_is_not_left_behind(kube: KubeWorld) -> None:
    launcher = kube.launcher(deadline_s=600)
    waits(launcher)
    kube.operator.waiting = {"learner": "ErrImagePull"}
    kube.operator.work()
    kube.ahead = 590
    waits(launcher)
    kube.ahead = 610
    with pytest.raises(LaunchRefused) as caught:
        launcher.submit(request())
    assert caught.value.told == "its cluster was not ready within 600 s: learner: 0 of 1 ready, 1 ErrImagePull"
    assert kube.clusters() == {}
    assert kube.kube.of(SECRETS) == {}


def test_a_head_that_does_not_answer_yet_is_waited_for(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    waits(launcher)
    kube.operator.work()
    kube.heads.silent = True
    assert launcher.status(NAME).state == "UNKNOWN"
    assert waits(launcher) == "the job's cluster is being made: its head does not answer yet"
    kube.heads.silent = False
    launcher.submit(request())
    assert kube.heads.submissions == [NAME]


@pytest.mark.parametrize("fault", ["lost", "unanswered", 503])
@pytest.mark.parametrize("at", range(1, 11))
def test_a_service_that_dies_at_any_request_leaves_what_the_next_one_goes_on_from(
    kube: KubeWorld, fault: str | int, at: int
) -> None:
    begun = [0]

    def dies(method: str, path: str) -> str | int | None:
        begun[0] += 1
        return fault if begun[0] == at else None

    kube.kube.fault = dies
    for _ in range(10):
        try:
            kube.launcher().submit(request())  # a new process each time, which remembers nothing
            break
        except (NotStarted, LauncherUnavailable):
            kube.operator.work()
    assert begun[0] >= at
    assert list(kube.clusters()) == [NAME]
    assert list(kube.kube.of(SECRETS)) == [f"{NAME}-auth"]
    assert kube.heads.submissions == [NAME]


def test_two_replicas_that_submit_at_once_start_one_driver(kube: KubeWorld) -> None:
    one, other = kube.launcher(), kube.launcher()
    waits(one)
    waits(other)
    kube.operator.work()
    one.submit(request())
    other.submit(request())
    assert kube.heads.submissions == [NAME]
    assert list(kube.clusters()) == [NAME]


def test_a_new_attempt_takes_the_place_of_the_old_ones_cluster_and_never_the_reverse(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    start(kube, launcher)
    other = request(job="job-" + "b" * 20)
    waits(launcher, job=other.job_id)
    start(kube, launcher, attempt=2)
    assert sorted(kube.clusters()) == [f"sapo-{JOB}-2", other.submission_id]
    assert waits(launcher, attempt=1) == "attempt 2 has begun"
    assert sorted(kube.clusters()) == [f"sapo-{JOB}-2", other.submission_id]


def test_a_cluster_of_somebody_elses_is_not_touched(kube: KubeWorld) -> None:
    kube.kube.put("ray.io/v1/rayclusters", {"metadata": {"name": NAME}, "spec": {}})
    with pytest.raises(LaunchRefused, match="not this service's"):
        kube.launcher().submit(request())
    assert list(kube.clusters()) == [NAME]
    assert kube.launcher(owner="").clusters() == []


def test_a_cluster_that_is_still_being_deleted_is_waited_for(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    waits(launcher)
    with kube.kube.lock:
        kube.clusters()[NAME]["metadata"]["finalizers"] = ["ray.io/gcs-ft-redis-cleanup-finalizer"]
    launcher.remove(NAME)
    assert launcher.clusters() == []
    assert waits(launcher) == "the cluster is being deleted, and is made anew then"
    with kube.kube.lock:
        del kube.clusters()[NAME]["metadata"]["finalizers"]
        kube.kube.delete("ray.io/v1/rayclusters", NAME)
    start(kube, launcher)


def test_a_secret_left_of_an_earlier_cluster_of_that_name_is_made_again(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    waits(launcher)
    with kube.kube.lock:
        left = kube.kube.objects[SECRETS, f"{NAME}-auth"]
        kube.kube.delete("ray.io/v1/rayclusters", NAME)
        kube.kube.put(SECRETS, left)  # the collector has not come to it yet
    waits(launcher)
    with kube.kube.lock:
        kube.kube.delete(SECRETS, f"{NAME}-auth")
    start(kube, launcher)
    assert launcher.status(NAME).state == "RUNNING"


def test_the_whole_story_needs_the_documented_rights_and_no_others(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    launcher.ping()
    kube.operator.complaint = ("FailedToCreateHeadPod", "later")
    waits(launcher)
    kube.operator.work()
    waits(launcher)
    kube.operator.complaint = None
    start(kube, launcher)
    launcher.scale(NAME, 12, None)
    launcher.clusters()
    launcher.remove(NAME)
    documented_rights = {
        (resource, verb)
        for rule in documented("rules")["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert kube.kube.used == documented_rights
    options = Options(template=kube.template, secret="s" * 64, owner="sapo", network_policy=True)
    asked = {(one.resource.rpartition("/")[2], one.verb) for one in rights.needed(options)}
    assert asked == documented_rights  # the doctor asks for all of them
