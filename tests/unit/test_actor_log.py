"""An actor's lines lie in a file named by its role, whoever of its process wrote them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PRINTS = (
    "import os, subprocess, sys; from sapo_ray.actor_log import log_as\n"
    "print('before')\n"
    "log_as('rollout-0.1')\n"
    "print('line'); print('error', file=sys.stderr); os.write(1, b'engine\\n')\n"
    "sys.stdout.flush(); subprocess.run(['sh', '-c', 'echo child; echo complaint >&2'])\n"
)


def run(folder: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "SAPO_LOG_DIR"}
    environment |= {"PYTHONUNBUFFERED": "1"} | ({} if folder is None else {"SAPO_LOG_DIR": str(folder)})
    return subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, text=True, env=environment, check=True)


def test_everything_from_then_on_goes_to_the_file_of_the_role(tmp_path: Path) -> None:
    result = run(tmp_path / "run" / "logs")
    assert (result.stdout, result.stderr) == ("before\n", "")
    (file,) = (tmp_path / "run" / "logs").iterdir()
    assert file.name == "rollout-0.1.log"
    head, *lines = file.read_text().splitlines()
    assert head.startswith("--- rollout-0.1: process ")
    assert lines == ["line", "error", "engine", "child", "complaint"]


def test_another_attempt_writes_after_the_first(tmp_path: Path) -> None:
    run(tmp_path)
    first = (tmp_path / "rollout-0.1.log").read_text()
    run(tmp_path)
    both = (tmp_path / "rollout-0.1.log").read_text()
    assert both.startswith(first)
    assert both.count("--- rollout-0.1: process ") == 2


def test_without_a_folder_or_with_one_that_cannot_be_made_lines_stay_where_they_went(tmp_path: Path) -> None:
    assert run(None).stdout.splitlines() == ["before", "line", "engine", "child"]
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "logs")
    assert result.stdout.splitlines() == ["before", "line", "engine", "child"]
    assert "rollout-0.1: its lines stay in Ray's own files: " in result.stderr
