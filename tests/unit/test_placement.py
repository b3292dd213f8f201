"""Where actors are asked to run."""

from __future__ import annotations

import pytest

from sapo_ray.placement import ACCELERATOR, ROLE_LABEL, label_selector, wants_gpus


def test_a_role_asks_for_its_nodes_only_where_nodes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROLE_LABEL, raising=False)
    assert label_selector("rollout") == {}
    monkeypatch.setenv(ROLE_LABEL, "example.org/role")
    assert label_selector("verifier") == {"example.org/role": "verifier"}


@pytest.mark.parametrize(
    ("said", "cluster_has", "wanted"),
    [("", True, True), ("", False, False), ("gpu", False, True), ("cpu", True, False)],
)
def test_the_operator_says_what_a_cluster_that_is_empty_now_will_have(
    monkeypatch: pytest.MonkeyPatch, said: str, cluster_has: bool, wanted: bool
) -> None:
    monkeypatch.setenv(ACCELERATOR, said)
    assert wants_gpus(cluster_has) is wanted
