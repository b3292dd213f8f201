"""Which lines of a log are shown."""

from sapo_ray.diagnosis.log_lines import telling


def test_the_last_error_of_the_newest_process_is_shown_with_the_lines_before_it() -> None:
    log = b"""--- rollout-0: process 1 on a, 2026-11-23 10:00:00+0000
ValueError: of an earlier life
--- rollout-0: process 2 on a, 2026-11-23 10:05:00+0000
INFO ready
Traceback (most recent call last):
  File "engine.py", line 3, in step
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
INFO shutting down
INFO bye
"""
    assert telling(log)[-1] == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert not any("earlier life" in line or "shutting down" in line for line in telling(log))


def test_a_log_without_errors_shows_its_last_lines_and_long_ones_are_cut() -> None:
    assert telling(b"".join(b"line %d\n" % i for i in range(20))) == [f"line {i}" for i in range(12, 20)]
    assert [len(line) for line in telling(b"x" * 1000)] == [300]
    assert telling(b"") == []
    assert telling(b"\xff\xfe broken\n") == ["\ufffd\ufffd broken"]
