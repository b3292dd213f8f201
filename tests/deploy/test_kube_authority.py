"""The certificate authority of a cluster is renewed, while a service that talks to its API goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from api_server_stand_in import Kubernetes

from sapo_ray.control.kube import KubeClient
from sapo_ray.control.launcher import LauncherUnavailable

CONTROL = "demo-sapo-ray-control"


def renew(account: Path, kube: Kubernetes) -> None:
    """As the kubelet does it: the new file takes the old one's place at once."""
    new = account / "new"
    new.write_bytes(kube.authority.read_bytes())
    os.replace(new, account / "ca.crt")


def test_a_renewed_authority_is_known_without_a_restart_and_no_other_is(kube: Kubernetes, tmp_path: Path) -> None:
    account = kube.account(tmp_path / "account", CONTROL)
    with KubeClient(kube.url, account) as api:
        kube.renew()
        with pytest.raises(LauncherUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            api.find("ray.io/v1/rayclusters")
        renew(account, kube)
        assert api.find("ray.io/v1/rayclusters") == []
    with KubeClient(kube.url, account) as api:
        kube.renew()
        with pytest.raises(LauncherUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            api.find("ray.io/v1/rayclusters")


def test_an_authority_that_is_renewed_by_nonsense_is_told_until_it_is_whole(kube: Kubernetes, tmp_path: Path) -> None:
    account = kube.account(tmp_path / "account", CONTROL)
    with KubeClient(kube.url, account) as api:
        assert api.find("ray.io/v1/rayclusters") == []
        (account / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\nno\n")
        with pytest.raises(LauncherUnavailable, match="cannot be asked"):
            api.find("ray.io/v1/rayclusters")
        renew(account, kube)
        assert api.find("ray.io/v1/rayclusters") == []
