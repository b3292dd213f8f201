"""What a person sees of a run, on a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from sapo_ray.progress import ProgressDisplay, print_result


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def shown(*events: dict[str, Any]) -> str:
    """The last picture of the display after these events, as text."""
    console = Console(force_terminal=True, width=80, record=True, legacy_windows=False)
    with ProgressDisplay(console) as display:
        for event in events:
            display({"time": 0.0, "attempt": 1, "seq": 1, **event})
    return console.export_text()


TRAINING = (
    {"kind": "phase", "phase": "train", "step": 0, "steps": 60},
    {"kind": "evaluation", "step": 0, "greedy": {"mean": 0.953}},
    {"kind": "step", "step": 20, "steps": 60, "metrics": {"reward/mean": 0.75}},
)


def test_bar_note_and_time_all_stand_in_80_columns() -> None:
    drawn = shown(*TRAINING)
    line = drawn[drawn.rindex(" training") :].splitlines()[0]  # a live display draws over the same line
    assert "20/60  reward 0.750  held-out 0.953" in line
    assert "0:00:00" in line
    assert line.count("━") >= 10
    assert len(line) == 79  # and one for the spinner


def test_a_warm_start_shows_its_step_and_accuracy() -> None:
    text = shown(
        {"kind": "phase", "phase": "model"}, {"kind": "warm_start", "step": 200, "loss": 1.25, "accuracy": 0.21}
    )
    assert "step 200, sampled accuracy 0.21" in text
    assert "model and data" in text


def test_the_run_folder_is_named_at_the_start_brackets_and_all() -> None:
    text = shown({"kind": "transition", "state": "starting", "run_dir": "/data/[red]runs/a"})
    assert "run /data/[red]runs/a\n" in text


def test_a_lost_worker_is_shown_with_its_reason_and_a_ready_one_is_not() -> None:
    text = shown(
        {"kind": "worker", "what": "worker_lost", "worker": "rollout-1", "reason": "killed [by] hand"},
        {"kind": "worker", "what": "worker_ready", "worker": "rollout-2"},
        {"kind": "worker", "what": "takeover_failed", "worker": "rollout-3", "reason": "checksum"},
        {"kind": "worker", "what": "worker_not_replaced", "worker": "rollout-4", "reason": "no room"},
    )
    assert "worker rollout-1 was lost: killed [by] hand" in text
    assert "rollout-2" not in text
    assert "worker rollout-3 failed to take the weights over: checksum" in text
    assert "worker rollout-4 is not replaced: no room" in text


def test_advice_is_a_note_and_other_conditions_keep_their_fields() -> None:
    text = shown(
        {"kind": "condition", "condition": "Advice", "reason": "use betas [0.9, 0.99]"},
        {"kind": "condition", "condition": "StaleDrops", "rate": 0.5},
    )
    assert "note: use betas [0.9, 0.99]" in text
    assert "reason" not in text
    assert "StaleDrops: rate 0.5" in text


def test_the_last_table_counts_completions_without_verdict() -> None:
    accuracy = {"mean": 0.5, "low": 0.4, "high": 0.6, "prompts": 900, "completions": 893, "errors": 7}
    after = {"greedy": accuracy, "sampled": None, "by_source": {}}
    console = Console(width=80, record=True)
    print_result(
        console,
        {"accuracy": {"before": None, "after": after}, "seconds": {"train": 2.0}, "run_dir": "r", "export": "r/export"},
    )
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "│ greedy │ - │ 0.500 [0.400, 0.600] │ 900 │ 7 │" in lines


def test_an_evaluation_by_itself_shows_how_far_it_is() -> None:
    text = shown(
        {"kind": "phase", "phase": "evaluating", "prompts": 512},
        {"kind": "evaluating", "completions": "sampled", "done": 128, "prompts": 512},
    )
    line = text[text.rindex("held-out accuracy") :].splitlines()[0]
    assert "sampled  128/512" in line
