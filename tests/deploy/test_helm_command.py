"""The chart by the helm command itself, where there is one (on the PATH, or named by HELM)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from chart_rendering import CHART, EXAMPLES, render

HELM = os.environ.get("HELM") or shutil.which("helm")
pytestmark = pytest.mark.skipif(HELM is None, reason="no helm command: set HELM to one, or put it on the PATH")


def helm(*arguments: str, folder: Path) -> str:
    assert HELM is not None
    places = {name: str(folder / name) for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")}
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **places}
    done = subprocess.run([HELM, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_lints_strictly_and_renders_what_its_library_renders(name: str, tmp_path: Path) -> None:
    values = str(EXAMPLES[name])
    helm("lint", "--strict", str(CHART), "-f", values, folder=tmp_path)
    shown = helm("template", "demo", str(CHART), "-f", values, "-n", "rl", folder=tmp_path)
    ours = render(yaml.safe_load(Path(values).read_text()))
    theirs = [one for one in yaml.safe_load_all(shown) if one]

    def key(thing: dict[str, object]) -> str:
        return yaml.safe_dump(thing)

    assert sorted(theirs, key=key) == sorted(ours, key=key)


def test_the_chart_packages_with_all_that_it_needs(tmp_path: Path) -> None:
    helm("package", str(CHART), "-d", str(tmp_path), folder=tmp_path)
    (package,) = tmp_path.glob("sapo-ray-*.tgz")
    shown = helm("template", "demo", str(package), "--set", "monitoring.dashboard.enabled=true", folder=tmp_path)
    assert "sapo_store_up" in shown
