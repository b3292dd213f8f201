"""What the launcher's errors say: enough for the operator's log, and no password."""

from __future__ import annotations

import pytest

from sapo_ray.control.launcher import LauncherUnavailable, RayJobs


def test_an_address_with_a_password_is_told_without_it() -> None:
    with RayJobs("http://operator:hunter2@127.0.0.1:1") as jobs, pytest.raises(LauncherUnavailable) as caught:
        jobs.ping()
    assert "http://127.0.0.1:1" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "operator" not in str(caught.value)
