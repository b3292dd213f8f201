"""What others wrote is shown on a terminal and cannot steer it."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sapo_ray.progress import ProgressDisplay
from sapo_ray.terminal import LogText, json_line, printable, shown

CONTROLS = [chr(code) for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"]


def test_no_control_character_but_newline_and_tab_reaches_a_terminal() -> None:
    assert len(CONTROLS) == 63
    assert not set(printable("a".join(CONTROLS))) & set(CONTROLS)
    assert printable("\x1b]0;title\x07\x9b2J\tb\n") == "\\x1b]0;title\\x07\\x9b2J\tb\n"
    assert printable("\x1b[31mred\x1b[0;1m \x1b[2J") == "red \\x1b[2J"
    assert printable("one\r\ntwo\rthree \ud800") == "one\ntwo\\x0dthree ?"


def test_what_is_no_control_character_stays() -> None:
    assert printable("grüße 中文 👩‍🔬 \\x1b [b]") == "grüße 中文 👩‍🔬 \\x1b [b]"


def test_markup_in_a_text_is_text() -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, highlight=False).print(shown("[red]\x1b[31mx[/] \x1b]8;;u\x07"))
    assert out.getvalue() == "[red]x[/] \\x1b]8;;u\\x07\n"


@given(st.text(st.characters(codec="utf-8")))
def test_json_stays_what_it_is_and_has_no_control_character(text: str) -> None:
    line = json_line(json.dumps({"text": text}, ensure_ascii=False))
    assert json.loads(line) == {"text": text}
    assert not set(line) & set(CONTROLS)


@given(
    st.lists(st.sampled_from([b"\x1b", b"[3", b"1m", b"\r", b"\n", b"a", "ü".encode(), b"\xc3", b"\x9b", b"\x1b[2J"]))
)
def test_a_log_in_parts_is_shown_as_it_is_in_one(parts: list[bytes]) -> None:
    whole, log = LogText(), LogText()
    expected = whole.feed(b"".join(parts)) + whole.rest()
    assert "".join(log.feed(part) for part in parts) + log.rest() == expected
    assert not set(expected) & set(CONTROLS)


def test_a_progress_bar_in_a_log_is_lines() -> None:
    log = LogText()
    assert log.feed(b"10%\r") + log.feed(b"20%\r\n") + log.feed("\x1b[36m(pid=1)\x1b[0m grü".encode()[:-1]) == (
        "10%\n20%\n(pid=1) gr"
    )
    assert log.rest() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("terminal", [True, False])
def test_events_of_a_run_steer_no_terminal(terminal: bool) -> None:
    out = io.StringIO()
    evil = "\x9b2J\x1b]0;owned\x07"
    display = ProgressDisplay(Console(file=out, force_terminal=terminal, width=200))
    with display:
        display({"kind": "phase", "phase": f"train{evil}", "steps": 2})
        display({"kind": "condition", "condition": f"Odd{evil}", "reason": evil, f"key{evil}": evil})
        display({"kind": "condition", "condition": "Advice", "reason": evil})
        display({"kind": "worker", "what": "worker_lost", "worker": f"rollout-0{evil}", "reason": evil})
        display({"kind": "rollback", "to_step": 1, "checkpoint": evil})
        display({"kind": "transition", "state": "starting", "run_dir": evil})
    assert "\x9b" not in out.getvalue()
    assert "\x1b]" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert out.getvalue().count("\\x1b]0;owned\\x07") >= 6
