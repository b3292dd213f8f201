"""An API server that refuses, breaks or is away, and clusters whose heads are lost."""

from __future__ import annotations

import re
import socket
from typing import Any

import httpx
import pytest
from fake_operator import PODS, READY, SECRETS
from kube_world import JOB, KubeWorld, documented, request
from test_kube_launch import NAME, start, waits
from typer.testing import CliRunner

from sapo_ray.cli import app
from sapo_ray.control.kube import KubeClient, KubeClusters
from sapo_ray.control.kube.making import Options
from sapo_ray.control.launcher import ClusterUnavailable, LauncherUnavailable, LaunchRefused
from sapo_ray.control.launchers import launchers
from sapo_ray.control.settings import load_settings
from sapo_ray.errors import ConfigError


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(kube: KubeWorld, code: int) -> None:
    launcher = kube.launcher()
    kube.kube.fault = lambda method, path: code
    with pytest.raises(LauncherUnavailable, match=f"rayclusters answered {code} Fault: on demand"):
        launcher.ping()
    with pytest.raises(LauncherUnavailable):
        launcher.submit(request())
    kube.kube.fault = lambda method, path: None
    launcher.ping()
    start(kube, launcher)


def test_a_server_that_is_not_there_is_told_with_its_address(kube: KubeWorld) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with KubeClient(url, kube.account) as api, pytest.raises(LauncherUnavailable, match=re.escape(url)):
            api.find("v1/pods")


def test_an_answer_that_is_not_of_kubernetes_is_told(kube: KubeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    with KubeClient(kube.kube.url, kube.account) as api:
        page = httpx.MockTransport(lambda asked: httpx.Response(200, text="<html>\nsign in"))
        monkeypatch.setattr(api, "_http", httpx.Client(base_url=kube.kube.url, transport=page))
        with pytest.raises(LauncherUnavailable, match="answered 200: sign in"):
            api.find("v1/pods")


def test_a_token_that_the_kubelet_renews_is_used_from_then_on(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    launcher.ping()
    kube.kube.tokens = {"new"}
    with pytest.raises(LauncherUnavailable, match=r"401 Unauthorized.*is the service account's token mounted"):
        launcher.ping()
    (kube.account / "token").write_text("new\n")
    launcher.ping()


@pytest.mark.parametrize("taken", range(5))
def test_a_missing_right_is_told_and_starts_nothing(kube: KubeWorld, taken: int) -> None:
    kube.kube.rules = [rule for number, rule in enumerate(kube.kube.rules) if number != (0, 1, 2, 4, 5)[taken]]
    launcher = kube.launcher()
    with pytest.raises(LauncherUnavailable, match=r"403 Forbidden.*cannot (create|list|get).*Role must grant this"):
        launcher.submit(request())
    assert kube.heads.submissions == []


def test_a_quota_keeps_a_job_waiting_and_fails_none(kube: KubeWorld) -> None:
    kube.kube.quota = {"ray.io/v1/rayclusters": 0}
    launcher = kube.launcher()
    assert waits(launcher) == "a quota of Kubernetes is used up; the job's cluster is made when there is room"
    kube.kube.quota = {}
    start(kube, launcher)


@pytest.mark.parametrize(
    "said",
    [
        'admission webhook "validate.policies" denied the request: hostPath volumes are not allowed',
        "rayclusters is forbidden: ValidatingAdmissionPolicy 'images' with binding 'all' denied request: no latest",
    ],
)
def test_a_policy_of_the_cluster_that_forbids_the_object_is_final(kube: KubeWorld, said: str) -> None:
    kube.kube.denied = said
    with pytest.raises(LaunchRefused, match=re.escape(said)) as caught:
        kube.launcher().submit(request())
    assert caught.value.told == "the cluster refused to start the driver; the service's log says why"


def test_a_deployment_that_is_not_there_is_told(kube: KubeWorld) -> None:
    with pytest.raises(LauncherUnavailable, match="no Deployment elsewhere; is SAPO_KUBE_OWNER right"):
        kube.launcher(owner="elsewhere").submit(request())


def test_a_server_without_kuberay_is_no_server_without_clusters(
    kube: KubeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fake_kube

    monkeypatch.delitem(fake_kube.KINDS, "ray.io/v1/rayclusters")
    launcher = kube.launcher()
    for ask in (launcher.ping, lambda: launcher.status(NAME)):
        with pytest.raises(LauncherUnavailable, match="is the KubeRay operator installed"):
            ask()


def test_a_template_that_breaks_later_holds_new_clusters_and_touches_none_that_run(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    start(kube, launcher)
    kube.template.write_text("kind: [")
    assert launcher.status(NAME).state == "RUNNING"
    with pytest.raises(LauncherUnavailable, match="cannot be read"):
        launcher.submit(request(job="job-" + "b" * 20))


def test_a_lost_head_is_a_lost_driver(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    start(kube, launcher)
    with kube.kube.lock:
        kube.kube.delete(PODS, f"{NAME}-head")
    assert launcher.status(NAME).state == "UNKNOWN"
    assert launcher.status(NAME).message == "its cluster's head is not ready"
    kube.operator.work()  # a new head, which knows no driver
    assert launcher.status(NAME).state == "UNKNOWN"
    assert launcher.status(NAME).message == "the cluster does not know this submission"


def test_a_head_that_is_ready_and_silent_is_given_five_minutes(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    start(kube, launcher)
    kube.heads.silent = True
    kube.ahead = 290
    with pytest.raises(ClusterUnavailable):
        launcher.status(NAME)
    kube.ahead = 310
    assert launcher.status(NAME).state == "UNKNOWN"
    kube.heads.silent = False
    assert launcher.status(NAME).state == "RUNNING"
    kube.heads.silent = True
    with pytest.raises(ClusterUnavailable):
        launcher.status(NAME)


def test_an_end_is_told_in_rays_words(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    start(kube, launcher)
    kube.heads.become(NAME, "FAILED", "exit code 1\nValueError: no")
    found = kube.launcher().status(NAME)
    assert (found.state, found.message) == ("FAILED", "exit code 1\nValueError: no")


def test_a_driver_is_stopped_and_its_cluster_stays_for_its_log(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    start(kube, launcher)
    launcher.stop(NAME)
    assert launcher.status(NAME).state == "STOPPED"
    assert launcher.logs(NAME) == f"log of {NAME}"


@pytest.mark.parametrize("cut_off", ["silent", "no head", "never started"])
def test_a_driver_that_cannot_be_asked_to_stop_loses_its_cluster(kube: KubeWorld, cut_off: str) -> None:
    launcher = kube.launcher()
    waits(launcher)
    if cut_off != "never started":
        start(kube, launcher)
    if cut_off == "silent":
        kube.heads.silent = True
    if cut_off == "no head":
        kube.kube.delete(PODS, f"{NAME}-head")
    launcher.stop(NAME)
    assert kube.clusters() == {}
    assert kube.kube.of(PODS) == {}
    assert launcher.status(NAME).state == "UNKNOWN"
    assert launcher.logs(NAME) == ""
    launcher.stop(NAME)


def test_after_a_change_of_the_token_waiting_clusters_are_made_anew_and_running_ones_left_alone(
    kube: KubeWorld,
) -> None:
    running, waiting = kube.launcher(), "job-" + "b" * 20
    start(kube, running)
    waits(running, job=waiting)
    launcher = kube.launcher(secret="t" * 64)
    assert launcher.status(NAME).message == "its cluster has another token than the service's now"
    assert launcher.logs(NAME) == ""
    assert waits(launcher, job=waiting) == "the service's token was changed: the cluster is made anew"
    start(kube, launcher, job=waiting)
    assert sorted(kube.clusters()) == [NAME, f"sapo-{waiting}-1"]
    launcher.stop(NAME)
    assert list(kube.clusters()) == [f"sapo-{waiting}-1"]


def test_a_stored_job_that_cannot_be_read_is_refused(kube: KubeWorld) -> None:
    with pytest.raises(LaunchRefused, match=f"{JOB}: its stored job cannot be read"):
        kube.launcher().submit(request(spec={"steps": "many"}))


def test_pods_are_ready_only_while_they_stay(kube: KubeWorld) -> None:
    launcher = kube.launcher()
    waits(launcher)
    kube.operator.work()
    head = kube.operator.head(NAME)
    assert head["status"]["conditions"] == READY
    with kube.kube.lock:
        head["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert waits(launcher) == "the job's cluster is being made: head: 0 of 1 ready, 1 Terminating"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "SAPO_SHARED_CLUSTER=false needs SAPO_CLUSTER_TEMPLATE"),
        ({"cluster_template": "x"}, "SAPO_SHARED_CLUSTER=false needs SAPO_RAY_AUTH_TOKEN"),
        ({"cluster_template": "x", "ray_auth_token": "t"}, "SAPO_KUBE_URL must name the Kubernetes API"),
        ({"cluster_template": "x", "ray_auth_token": "t", "kube_url": "http://k"}, "SAPO_KUBE_NAMESPACE must name"),
        (
            {"cluster_template": "/nowhere", "ray_auth_token": "t", "kube_url": "http://k", "kube_namespace": "n"},
            "SAPO_CLUSTER_TEMPLATE /nowhere cannot be read",
        ),
    ],
)
def test_what_a_cluster_for_each_job_needs_is_told_at_the_start(
    settings: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    over = {"shared_cluster": False, "kube_account_dir": "/nowhere"} | settings
    with pytest.raises(ConfigError, match=re.escape(told)), launchers(load_settings(**over), None):
        pass


def test_one_setting_decides_where_drivers_run(kube: KubeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    over = {"cluster_template": kube.template, "ray_auth_token": "t" * 64, "kube_account_dir": kube.account}
    with launchers(load_settings(shared_cluster=True, **over), None) as using:
        assert using.clusters is None
    with launchers(load_settings(shared_cluster=False, **over), None) as using:
        assert isinstance(using.launcher, KubeClusters)
        assert using.clusters is using.launcher


def test_without_an_owner_clusters_belong_to_nobody(kube: KubeWorld) -> None:
    waits(kube.launcher(owner=""))
    assert kube.clusters()[NAME]["metadata"]["ownerReferences"] == []


def test_a_wrong_template_is_refused_at_the_start(kube: KubeWorld) -> None:
    template = documented("apiVersion")
    del template["spec"]["workerGroupSpecs"][2]
    kube.write(template)
    with pytest.raises(ConfigError, match="needs one group with groupName verifier, it has 0"):
        kube.launcher()
    assert Options(template=kube.template, secret="s").deadline_s == 1800
    assert kube.kube.of(SECRETS) == {}


def doctor(kube: KubeWorld, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    settings = {
        "SAPO_SHARED_CLUSTER": "false",
        "SAPO_CLUSTER_TEMPLATE": str(kube.template),
        "SAPO_RAY_AUTH_TOKEN": "t" * 64,
        "SAPO_KUBE_URL": kube.kube.url,
        "SAPO_KUBE_ACCOUNT_DIR": str(kube.account),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["doctor", "--only", "ray", "--only", "clock", *arguments])
    return done.exit_code, " ".join(done.output.split())


def test_the_doctor_asks_the_kubernetes_api(kube: KubeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = doctor(kube, monkeypatch)
    assert code == 0
    assert "grants all rights that they need" in said
    assert "each job has a Ray of its own" in said
    assert kube.clusters() == {}
    kube.kube.rules.pop(0)
    code, said = doctor(kube, monkeypatch)
    assert code == 1
    assert all(f"{verb} rayclusters.ray.io" in said for verb in ("get", "list", "create", "patch", "delete"))
    assert "needs the rules that docs/kubernetes.md lists" in said


def test_the_doctor_looks_at_the_template_and_at_no_node(kube: KubeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    template = documented("apiVersion")
    del template["spec"]["workerGroupSpecs"][2]
    kube.write(template)
    code, said = doctor(kube, monkeypatch)
    assert code == 1
    assert "needs one group with groupName verifier" in said
    code, said = doctor(kube, monkeypatch, "--cluster")
    assert code == 2
    assert "SAPO_SHARED_CLUSTER=false" in said
