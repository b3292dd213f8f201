from __future__ import annotations

from pathlib import Path

import pytest

from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.errors import CheckpointError


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
    length = await journal.sync()
    journal.close()
    assert [r["kind"] for r in read_journal(path)] == ["step", "transition"]
    assert length == path.stat().st_size


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
