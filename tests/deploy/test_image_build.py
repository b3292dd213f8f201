"""The control plane's image, built by a real builder on a Debian root file system of the day, and run.

Debian's Python 3.11 stands in for the pinned base, which would have to be pulled. `make test-long`: it takes minutes.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[2]
BASE, IMAGE = "localhost/python-base:bookworm", "localhost/sapo-ray-control"
PACKAGES = "python3,python3-venv,ca-certificates"
START_S = 90
PORT = 18807


class Builder:
    """buildah with a store of its own, for whom neither a daemon nor namespaces are needed."""

    def __init__(self, folder: Path) -> None:
        self._options = ["--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]

    def __call__(self, *arguments: str, seconds: int = 120) -> str:
        command = ["buildah", *self._options, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        assert done.returncode == 0, f"{' '.join(arguments)}:\n{(done.stdout + done.stderr)[-3000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    if os.getuid() != 0 or not (shutil.which("buildah") and shutil.which("debootstrap")):
        pytest.skip("no buildah and debootstrap, or not root: no image was built")
    folder = tmp_path_factory.mktemp("images")
    root = folder / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        pytest.skip(f"debootstrap made no root file system: {done.stdout[-300:]}")
    builder = Builder(folder)
    container = builder("from", "scratch").strip()
    builder("copy", "--quiet", container, str(root), "/", seconds=300)
    builder("commit", "--quiet", container, BASE, seconds=300)
    builder("rm", container)
    shutil.rmtree(root)
    yield builder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def container(builder: Builder) -> str:
    """One of the image, built with the index and the certificates that this machine is set up for."""
    here = [one for one in ("/etc/pip.conf", "/etc/ssl/certs") if Path(one).exists()]
    volumes = [word for one in here for word in ("--volume", f"{one}:{one}:ro")]
    arguments = ["--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", "REVISION=0123abcd", *volumes]
    options = ["--isolation", "chroot", "--format", "docker", "--pull=false", "--file", "docker/control.Dockerfile"]
    builder("bud", *options, *arguments, "--tag", IMAGE, ".", seconds=1200)
    return builder("from", "--pull-never", IMAGE).strip()


def said(builder: Builder, container: str, script: str) -> str:
    """What a shell in the container prints."""
    return builder("run", "--isolation", "chroot", container, "--", "sh", "-c", script, seconds=240).strip()


def test_the_image_is_what_its_dockerfile_says(builder: Builder, container: str) -> None:
    config = json.loads(builder("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    assert (config["User"], config["Entrypoint"], config["Cmd"]) == ("10001:10001", ["sapo-ray"], ["serve"])
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abcd"
    assert "Healthcheck" in config
    assert set(config["ExposedPorts"]) == {"8800/tcp"}


def test_it_holds_the_locked_packages_and_no_installer_no_engine_no_sources(builder: Builder, container: str) -> None:
    script = (
        "import importlib.metadata as m; print(*sorted(f'{d.name.lower()}=={d.version}' for d in m.distributions()))"
    )
    found = {one.replace("_", "-") for one in said(builder, container, f'python -I -c "{script}"').split()}
    lines = (ROOT / "requirements" / "control.lock").read_text().splitlines()
    locked = {one.replace("_", "-") for one in lines if one and not one.startswith("#")}
    assert {one for one in found if not one.startswith("sapo-ray==")} == locked
    assert said(builder, container, "ls -A /src /home/sapo 2>/dev/null | grep -c py; id -u").split() == ["0", "10001"]
    assert said(builder, container, "touch /opt/venv/x /usr/x 2>&1 | grep -c denied") == "2"


def test_serve_starts_in_it_is_found_healthy_by_its_own_check_and_ends_in_order(
    builder: Builder, container: str
) -> None:
    check = json.loads(builder("inspect", "--type", "image", IMAGE))["Docker"]["config"]["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    healthy = shlex.join(check[1:])
    script = f"""
        export SAPO_PORT={PORT} SAPO_HOST=127.0.0.1 SAPO_RAY_JOBS_URL=http://127.0.0.1:1 SAPO_ADMIN_KEY={"k" * 32}
        sapo-ray serve > /tmp/log 2>&1 & service=$!
        for i in $(seq {START_S}); do {healthy} 2> /dev/null && break; sleep 1; done
        python -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:{PORT}/readyz").read().decode())'
        sapo-ray doctor --only storage --only dns | tail -1
        kill -TERM $service; wait $service; echo ended $?"""
    lines = said(builder, container, script).splitlines()
    assert json.loads(lines[0])["checks"] == {"database": "ok", "disk": "ok", "cluster": "down"}
    assert lines[1:] == ["nothing failed", "ended 0"]
