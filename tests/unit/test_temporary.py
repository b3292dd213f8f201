"""What a process that was killed left behind is removed; what may still be used is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sapo_ray import temporary
from sapo_ray.temporary import sweep, temporary_folder

OWNER = (
    "import time; from sapo_ray.temporary import temporary_folder\n"
    "with temporary_folder() as folder:\n"
    "    (folder / 'r').mkdir(); (folder / 'r' / 'log').write_text('x'); print(folder, flush=True); time.sleep(600)"
)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process and its temporary folder."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_the_folder_of_a_killed_process_is_removed_by_the_next_start(owner: tuple[Any, Path]) -> None:
    process, left = owner
    assert sweep() == [], "its owner lives"
    assert (left / "r" / "log").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with temporary_folder() as mine:
        assert not left.exists()
        assert mine.is_dir()


def test_a_killed_process_that_nobody_has_reaped_is_dead(owner: tuple[Any, Path]) -> None:
    process, left = owner
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert sweep() == [left]


def test_a_folder_is_for_its_user_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    with temporary_folder() as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith("sapo-")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def left_by(folder: Path, change: Callable[[dict[str, Any]], None] = lambda owner: None) -> Path:
    """A folder whose owner is this process, but for a change."""
    folder.mkdir()
    about = temporary._owner(os.getpid())
    change(about)
    (folder / temporary.OWNER).write_text(json.dumps(about))
    return folder


def test_a_number_given_to_another_process_and_a_restarted_machine_are_no_owners(tmp_path: Path) -> None:
    younger = left_by(tmp_path / "sapo-1", lambda owner: owner.update(started=owner["started"] - 1))
    before = left_by(tmp_path / "sapo-2", lambda owner: owner.update(boot="another", namespace="another"))
    assert sorted(sweep()) == [younger, before]


@pytest.mark.parametrize("what", ["host", "namespace"])
def test_a_process_that_cannot_be_looked_up_from_here_counts_as_alive(tmp_path: Path, what: str) -> None:
    folder = left_by(tmp_path / "sapo-1", lambda owner: owner.update({what: "another", "started": 1}))
    assert sweep() == []
    assert folder.exists()


def test_what_is_not_known_to_be_ours_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(owner: dict[str, Any]) -> None:
        owner["started"] -= 1

    (tmp_path / "sapo-without-owner").mkdir()
    (tmp_path / "sapo-file").write_text("x")
    for number, text in enumerate(("", "[]", "{}", '{"pid": "x"}', "\x00")):
        folder = tmp_path / f"sapo-{number}"
        folder.mkdir()
        (folder / temporary.OWNER).write_text(text)
    elsewhere = left_by(tmp_path / "other", dead)
    (tmp_path / "sapo-link").symlink_to(elsewhere)
    before = sorted(tmp_path.iterdir())
    assert sweep() == []
    left_by(tmp_path / "sapo-others", dead)
    uid = os.getuid()
    monkeypatch.setattr(temporary.os, "getuid", lambda: uid + 1)
    assert sweep() == []
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "sapo-others"])
