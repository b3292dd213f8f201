"""Reward functions that misbehave, importable by grading processes (they inherit the search path)."""

from __future__ import annotations

from pathlib import Path

import pytest

MISBEHAVING = '''
import ctypes, os, signal, subprocess, sys, time
hoard = []

def act(*, completion, gold, prompt):
    """Does what the completion says."""
    word, _, rest = completion.partition(" ")
    if word == "exit": os._exit(3)
    if word == "segfault": ctypes.string_at(0)
    if word == "eat":
        while True: hoard.append(bytes(64 << 20))  # never touched: fast even on a busy machine
    if word == "leak": hoard.append(bytes(4 << 20))
    if word == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)
        while True: time.sleep(1)
    if word == "sleep": time.sleep(float(rest or 1e9))
    if word == "print":
        print("x" * 100_000)
        os.write(1, b"y" * 100_000)
        sys.stdout.flush()
    if word == "read": sys.stdin.read()
    if word == "raise": raise ValueError(rest)
    if word == "quit": sys.exit(0)
    if word == "nan": return float("nan")
    if word == "infinite": return {"a": 1e308, "b": 1e308}
    if word == "text": return "1.0"
    if word == "none": return None
    if word == "empty": return {}
    if word == "parts": return {"answer": 1.0, "style": -0.25}
    if word == "fork":
        os.fork()
    if word == "scribble":
        for fd in range(3, 20):
            try: os.write(fd, bytes([0, 0, 0, 3]) + b"[1]")
            except OSError: pass
    if word == "spawn": subprocess.Popen(["sleep", rest])
    if word == "once":
        # Fails in the first process that meets it, works in the next.
        if not os.path.exists(rest):
            open(rest, "w").close()
            os._exit(1)
    return 1.0 if gold in completion else 0.0

def takes_nothing():
    return 1.0

not_a_function = 3
'''


@pytest.fixture
def misbehaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`module:function` of a reward function that does what the completion says."""
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    (tmp_path / "broken_reward.py").write_text("import no_such_module_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "misbehaving:act"
