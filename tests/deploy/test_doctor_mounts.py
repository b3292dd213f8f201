"""The doctor on file systems that are not there, read-only, full or too small: really mounted, in a mount namespace."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sapo_ray.cli import app
from sapo_ray.doctor import inside
from sapo_ray.doctor.storage import check_storage, marker

SKIP = 77


def mounted(tmp_path: Path, mounts: str, *arguments: str) -> tuple[int, dict[str, str]]:
    """Exit code and the finding of `doctor`, run where these mounts are made."""
    return finding(tmp_path, mounts, f"{sys.executable} -m sapo_ray.cli doctor --json {' '.join(arguments)}")


def finding(tmp_path: Path, mounts: str, command: str) -> tuple[int, dict[str, str]]:
    """Exit code and the one finding of a command, run where these mounts are made; they end with the process."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare: nothing can be mounted for a test")
    script = f"mount --make-rprivate / && {mounts} || exit {SKIP}\nexec {command}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    if done.returncode == SKIP or "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"this machine lets nothing be mounted: {done.stderr.strip()[-200:]}")
    (found,) = json.loads(done.stdout)["findings"]
    return done.returncode, found


def test_a_volume_mounted_read_only_fails(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    mount = f"mount -t tmpfs -o ro,size=16m none {tmp_path}/data"
    code, found = mounted(tmp_path, mount, "--only", "storage", "--data-dir", f"{tmp_path}/data")
    assert (code, found["status"]) == (1, "failed")
    assert "making a folder failed (Read-only file system)" in found["detail"]
    assert "mount it with write access" in found["remedy"]


def test_a_full_volume_fails_while_it_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}/data"
    code, found = mounted(tmp_path, mount, "--only", "storage", "--data-dir", f"{tmp_path}/data")
    assert (code, found["status"]) == (1, "failed")
    assert "(No space left on device)" in found["detail"]
    assert "the volume is full" in found["remedy"]


def test_a_node_with_a_volume_of_its_own_in_the_place_of_the_shared_one_fails(tmp_path: Path) -> None:
    """What the node looks at is really another file system, at the same path, and empty."""
    data = tmp_path / "data"
    data.mkdir()
    with marker(data) as (path, text):
        asked = inside.Asked(
            checks=["storage"],
            data_dir=str(data),
            min_free_gb=0.0,
            marker=str(path),
            text=text,
            control="",
            versions={},
        )
        look = (
            "import json, sys; from dataclasses import asdict; from sapo_ray.doctor import inside;"
            "found = inside.look_at_node(inside.Asked(**json.loads(sys.argv[1])), 'node b', 0, 0, {});"
            "print(json.dumps({'findings': [asdict(one) for one in found]}))"
        )
        own = shlex.join([sys.executable, "-c", look, json.dumps(asdict(asked))])
        assert finding(tmp_path, "true", own)[1]["status"] == "ok"
        _, found = finding(tmp_path, f"mount -t tmpfs -o size=16m none {data}", own)
    assert (found["status"], found["where"]) == ("failed", "node b")
    assert "No such file or directory" in found["detail"]
    assert "ReadWriteMany" in found["remedy"]


def test_the_shared_memory_that_containers_have_by_default_fails(tmp_path: Path) -> None:
    code, found = mounted(tmp_path, "mount -t tmpfs -o size=64m none /dev/shm", "--only", "shm")
    assert (code, found["status"]) == (1, "failed")
    assert found["detail"].startswith("/dev/shm has 64 MiB")
    assert "--shm-size" in found["remedy"]
    assert "medium Memory" in found["remedy"]


def test_shared_memory_that_is_small_beside_the_memory_is_a_warning(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < 6 << 30:
        pytest.skip("this machine's memory is so small that 1100 MiB are enough")
    code, found = mounted(tmp_path, "mount -t tmpfs -o size=1100m none /dev/shm", "--only", "shm")
    assert (code, found["status"]) == (0, "warning")


@pytest.mark.parametrize(
    ("size", "store", "status", "said"),
    [
        (64, 19, "failed", "/dev/shm has 64 MiB, 64 MiB free; at least 1024 MiB must be"),
        (1024, 819, "ok", "Ray's objects may take 819 MiB"),
        (2048, 4096, "warning", "Ray's objects may take 4096 MiB, more than there is, so that they lie on disk"),
    ],
)
def test_on_a_node_of_ray_its_object_store_must_fit(
    tmp_path: Path, size: int, store: int, status: str, said: str
) -> None:
    """However much of it is in use: jobs may run."""
    look = (
        "import json; from dataclasses import asdict; from sapo_ray.doctor.machine import check_shm;"
        f"print(json.dumps({{'findings': [asdict(check_shm('node b', store={store} << 20))]}}))"
    )
    mount = f"mount -t tmpfs -o size={size}m none /dev/shm"
    if status == "ok":
        mount += " && head -c 500M /dev/zero > /dev/shm/used"
    _, found = finding(tmp_path, mount, shlex.join([sys.executable, "-c", look]))
    assert (found["status"], found["where"]) == (status, "node b")
    assert said in found["detail"]


def test_a_folder_of_somebody_elses_fails_with_the_users_number(tmp_path: Path) -> None:
    """Root may write everywhere, so it is asked as nobody."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    for parent in tmp_path.parents:
        if parent.is_relative_to(tempfile.gettempdir()) and parent != Path(tempfile.gettempdir()):
            parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        found = check_storage(folder, 0.0)
    finally:
        os.seteuid(0)
    assert found.status == "failed"
    assert "Permission denied" in found.detail
    assert "10001" in found.remedy


def test_a_machine_on_which_nothing_was_started_yet_is_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` makes ./sapo-data; a folder that somebody named and that is not there may be a volume that is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAPO_DATA_DIR", raising=False)
    done = CliRunner().invoke(app, ["doctor", "--json", "--only", "storage"])
    (found,) = json.loads(done.stdout)["findings"]
    assert (done.exit_code, found["status"]) == (0, "ok")
    assert found["detail"].startswith(f"{tmp_path}/sapo-data is not there yet, `sapo-ray serve` makes it; ")
    assert list(tmp_path.iterdir()) == []
