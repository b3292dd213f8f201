from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sapo_ray.driver.journal import Journal, last_attempt, read_journal
from sapo_ray.errors import CheckpointError, ResourceError, Superseded


def test_events_are_numbered_from_one_in_each_attempt_and_ledger_lines_are_not(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for attempt in (1, 2):
        journal = Journal(path, attempt)
        journal.event("step", step=1)
        journal.ledger("issued", group="a:0:0")
        journal.event("step", step=2)
        journal.close()
    assert [(r["attempt"], r["kind"], r.get("seq")) for r in read_journal(path)] == [
        (1, "step", 1),
        (1, "issued", None),
        (1, "step", 2),
        (2, "step", 1),
        (2, "issued", None),
        (2, "step", 2),
    ]


async def test_a_line_torn_by_a_crash_is_cut_and_the_next_attempt_writes_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind":"step","seq":1}\n{"kind":"st')
    assert [r["kind"] for r in read_journal(path)] == ["step"]
    journal = Journal(path, 2)
    journal.event("transition", state="starting")
    await journal.sync()
    journal.close()
    assert [r["kind"] for r in read_journal(path)] == ["step", "transition"]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind":"step"}\nnot json\n{"kind":"step"}\n')
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:2: not a journal line"):
        list(read_journal(path))


def test_the_listener_hears_events_and_not_the_ledger(tmp_path: Path) -> None:
    heard: list[str] = []
    journal = Journal(tmp_path / "journal.jsonl", 1, lambda event: heard.append(event["kind"]))
    journal.ledger("issued", group="a:0:0")
    journal.event("phase", phase="train")
    journal.close()
    assert heard == ["phase"]


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The kernel itself refuses to write beyond `size`: first a part of the bytes, then an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_lines_that_the_disk_did_not_take_are_written_later_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, 1)
    journal.ledger("issued", group="a:0:0")
    await journal.sync()
    room = path.stat().st_size + 30
    for group in ("b:0:0", "c:0:0"):
        journal.ledger("issued", group=group)
    with files_no_longer_than(room):
        for _ in range(2):
            with pytest.raises(ResourceError, match=r"journal\.jsonl cannot be written .*free some space"):
                await journal.sync()
        assert [r["group"] for r in read_journal(path)] == ["a:0:0"]
        assert path.read_text().endswith("}\n"), "the half that was written is taken back"
    journal.ledger("issued", group="d:0:0")
    journal.close()
    assert [r["group"] for r in read_journal(path)] == ["a:0:0", "b:0:0", "c:0:0", "d:0:0"]


async def test_lines_stay_queued_until_they_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, but the fsync failed: nobody knows what the disk holds, so they are written again."""
    journal = Journal(tmp_path / "journal.jsonl", 1)
    journal.ledger("issued", group="a:0:0")

    def fails(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(ResourceError, match="No space left on device"):
            await journal.sync()
    journal.close()
    assert [r["group"] for r in read_journal(tmp_path / "journal.jsonl")] == ["a:0:0"]


def test_a_full_disk_at_the_end_is_an_error_and_the_file_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    journal.event("step", step=1)
    with files_no_longer_than(0), pytest.raises(ResourceError):
        journal.close()
    journal.close()


def test_a_metric_that_is_not_finite_is_null_and_does_not_end_the_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    journal.event("step", metrics={"loss": float("nan"), "norm": float("inf"), "reward": 0.5})
    journal.close()
    (record,) = read_journal(tmp_path / "journal.jsonl")
    assert record["metrics"] == {"loss": None, "norm": None, "reward": 0.5}


def test_an_event_is_counted_before_anyone_can_read_its_line_and_not_if_there_is_none(tmp_path: Path) -> None:
    """Who ships events takes a number above the count for another driver's."""
    seen: list[tuple[int, int]] = []

    class Watched(Journal):
        def _append(self, record: dict[str, Any]) -> None:
            super()._append(record)
            self.sync_now()  # as the link's thread may, while this one is not running
            seen.append((list(read_journal(self.path))[-1]["seq"], self.seq))

    journal = Watched(tmp_path / "journal.jsonl", 1)
    journal.event("phase")
    journal.event("phase")
    assert seen == [(1, 1), (2, 2)]
    with pytest.raises(TypeError):
        journal.event("phase", phase=object())
    assert journal.seq == 2
    journal.fence(Superseded("by another"))
    with pytest.raises(Superseded):
        journal.event("phase")
    assert journal.seq == 2
    journal.close()


def test_half_of_a_surrogate_pair_is_replaced_and_the_journal_stays_writable(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 1)
    journal.event("condition", reason="bad \udcff name", metrics={"\ud83d": float("nan")}, whole="é😀")
    journal.event("step", step=1)
    journal.close()
    first, second = read_journal(tmp_path / "journal.jsonl")
    assert (first["reason"], first["whole"]) == ("bad \ufffd name", "é😀")
    assert first["metrics"] == {"\ufffd": None}
    assert (second["kind"], second["seq"]) == ("step", 2)


@pytest.mark.parametrize("line", [b"{}", b"nonsense", b"\xff\xfe", b"[1]"])
def test_a_damaged_last_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"attempt": 1}\n' + line + b"\n")
    with pytest.raises(CheckpointError, match=r"the last line of .*journal\.jsonl is no journal line"):
        last_attempt(path)


def test_a_line_that_is_not_text_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"attempt": 1}\n\xff\xfe\n')
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:2: not a journal line"):
        list(read_journal(path))
