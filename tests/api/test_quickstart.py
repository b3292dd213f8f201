"""`quickstart`: a service for one job, which leaves nothing behind however it ends. Drivers are played."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
BOUND_S = 120.0


class Quickstart:
    """The command in a process and a folder of its own."""

    def __init__(self, story: str, folder: Path) -> None:
        server = f"import sys; sys.path.insert(0, {str(HERE)!r}); import quickstart_server as s; s.main()"
        dying = "from sapo_ray.cli.quickstart import die_with_parent; die_with_parent()"
        child = (sys.executable, "-c", f"{dying}; {server}", story)
        code = f"from sapo_ray import cli; from sapo_ray.cli import quickstart as q; q.CHILD = {child!r}; cli.main()"
        self._tag = f"quickstart-{os.getpid()}-{time.monotonic_ns()}"
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "quickstart"],
            cwd=folder,
            env={**os.environ, "SAPO_TEST_TAG": self._tag, "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode, out, err

    def left(self) -> list[int]:
        """Living processes of this command, after a moment to end."""
        end = time.monotonic() + 20
        while (found := self._living()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _living(self) -> list[int]:
        found = []
        for one in psutil.process_iter(["pid"]):
            try:
                if one.status() != psutil.STATUS_ZOMBIE and one.environ().get("SAPO_TEST_TAG") == self._tag:
                    found.append(one.pid)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def until(self, text: str) -> None:
        """Read on until this was printed."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        pytest.fail(f"{text!r} was never printed: {self.process.stderr.read() if self.process.stderr else ''}")


def test_the_result_is_shown_and_the_service_ended(tmp_path: Path) -> None:
    quickstart = Quickstart("succeeds", tmp_path)
    code, out, err = quickstart.end()
    assert (code, err) == (0, "")
    assert "3/3  reward 0.500" in out
    assert "0.900 [0.800, 0.950]" in out
    assert "succeeded: all steps were taken" in out
    assert quickstart.left() == []
    key = tmp_path / "sapo-data" / "quickstart.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.read_text().strip() not in out
    assert Quickstart("succeeds", tmp_path).end()[0] == 0, "a second round in the same folder works"


def test_a_job_that_fails_is_exit_code_1_with_the_reason(tmp_path: Path) -> None:
    quickstart = Quickstart("fails", tmp_path)
    code, out, _ = quickstart.end()
    assert code == 1
    assert "failed: TrainingFailed: as the test wants it" in out
    assert quickstart.left() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_cancels_the_job_and_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    quickstart = Quickstart("hangs", tmp_path)
    quickstart.until("3/3  reward")
    quickstart.process.send_signal(number)
    ended, out, err = quickstart.end()
    assert ended == code
    assert "cancelling job-" in out
    assert "Traceback" not in err
    assert quickstart.left() == []
    log = (tmp_path / "sapo-data" / "serve.log").read_text()
    assert ":cancel" in log


def test_killed_it_takes_the_service_with_it(tmp_path: Path) -> None:
    quickstart = Quickstart("hangs", tmp_path)
    quickstart.until("3/3  reward")
    quickstart.process.kill()
    quickstart.end()
    assert quickstart.left() == []


def test_a_service_that_cannot_start_is_shown_with_its_last_words(tmp_path: Path) -> None:
    quickstart = Quickstart("dies", tmp_path)
    code, _, err = quickstart.end()
    assert code == 1
    assert "the service ended while it started (exit code 1)" in err
    assert "no cluster can be started here" in err
    assert quickstart.left() == []
