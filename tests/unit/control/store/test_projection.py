"""What a driver's events do to its job: every pair of state and event, and events that make no sense."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.api.jobs import LIVE, TERMINAL, Summary
from sapo_ray.control.store import JobRow, projection
from sapo_ray.control.store.projection import apply

STATES = sorted(LIVE | TERMINAL | {"queued", "paused"})
SAID = ["starting", "running", "paused", "cancelled", "interrupted", "failed", "succeeded"]
ENDED = {"paused": "paused", "cancelled": "recovering", "interrupted": "recovering"} | {
    "failed": "failed",
    "succeeded": "succeeded",
}
EXPECTED = {
    "queued": {"succeeded": "succeeded"},
    "paused": {"succeeded": "succeeded"},
    "starting": {**ENDED, "running": "running"},
    "running": ENDED,
    "pausing": ENDED,
    "recovering": {
        "starting": "starting",
        "running": "running",
        "paused": "paused",
        "failed": "failed",
        "succeeded": "succeeded",
    },
    "cancelling": {"cancelled": "cancelled", "failed": "cancelled", "succeeded": "succeeded"},
}


def job(state: str = "running", **changes: Any) -> JobRow:
    values: dict[str, Any] = {"state": state, "reason": "", "since": 100.0, "desired_state": "run", "discard": False}
    values |= {"attempt": 2, "step": 4, "steps": 60, "conditions": [], "summary": {}, "result": None}
    return JobRow(**values | {"started_at": None, "finished_at": None} | changes)


def transition(said: str, **more: Any) -> dict[str, Any]:
    return {"kind": "transition", "state": said, **more}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("state", STATES)
def test_a_driver_s_word_brings_a_job_from_each_state_where_it_should(state: str, said: str) -> None:
    row = job(state)
    change = apply(row, transition(said), at=200.0)
    expected = EXPECTED.get(state, {}).get(said)
    assert row.state == (expected or state)
    assert (None if change is None else (change.previous, change.state)) == (
        None if expected is None else (state, expected)
    )
    assert row.since == (100.0 if expected is None else 200.0)


def test_the_table_in_the_documentation_is_what_the_code_does() -> None:
    lines = re.findall(r"^\| (\w+) +\|(.+)\|$", projection.__doc__ or "", re.MULTILINE)
    heads = [cell.strip() for cell in lines[0][1].split("|")]
    assert heads == SAID
    table = {
        state: {said: cell.strip() for said, cell in zip(heads, cells.split("|"), strict=True) if cell.strip() != "."}
        for state, cells in lines[1:]
    }
    assert table == EXPECTED | {"terminal": {}}


def test_success_of_a_job_to_be_discarded_is_a_cancellation() -> None:
    row = job("cancelling", desired_state="cancel", discard=True)
    apply(row, transition("succeeded"), at=200.0)
    assert (row.state, row.finished_at) == ("cancelled", 200.0)
    assert "before the driver heard of the cancelling" in row.reason


def test_a_failure_while_cancelling_keeps_the_failure_as_reason() -> None:
    row = job("cancelling", desired_state="cancel")
    apply(row, transition("failed", reason="OSError: disk"), at=200.0)
    assert (row.state, row.reason) == ("cancelled", "failed while it was being cancelled: OSError: disk")


@pytest.mark.parametrize("said", ["starting", "running"])
def test_a_driver_that_starts_while_a_pause_is_asked_for_is_pausing(said: str) -> None:
    row = job("recovering", desired_state="pause")
    apply(row, transition(said), at=200.0)
    assert row.state == "pausing"


def test_a_step_after_the_driver_was_given_up_shows_that_it_lives() -> None:
    late, alive = job("recovering"), job("recovering")
    assert apply(late, {"kind": "step", "step": 5}, at=99.0) is None
    assert late.state == "recovering"
    change = apply(alive, {"kind": "step", "step": 5}, at=101.0)
    assert change is not None
    assert (alive.state, change.previous) == ("running", "recovering")


def test_an_end_brings_the_result_and_its_time() -> None:
    row = job()
    apply(row, transition("succeeded", reason="all steps were taken", result={"steps": 60}), at=200.0)
    assert (row.result, row.finished_at, row.reason) == ({"steps": 60}, 200.0, "all steps were taken")
    apply(row, transition("failed", result={"steps": 0}), at=300.0)
    assert (row.state, row.result, row.finished_at) == ("succeeded", {"steps": 60}, 200.0)


def test_an_interruption_is_no_result() -> None:
    row = job()
    apply(row, transition("interrupted", result={"status": "interrupted"}), at=200.0)
    assert (row.state, row.result, row.finished_at) == ("recovering", None, None)


def test_a_driver_s_slow_clock_does_not_turn_time_back() -> None:
    row = job("starting")
    apply(row, transition("running"), at=50.0)
    assert row.since == 100.0


def test_a_step_brings_progress_and_the_newest_figures() -> None:
    metrics = {
        "reward/mean": 0.5,
        "rollout/tokens_per_second": 1200.0,
        "age/sample_mean": 0.25,
        "verifier/error_rate": 0.01,
        "rollout/workers": 3.0,
    }
    row = job(summary={"accuracy": 0.3})
    apply(row, {"kind": "step", "step": 5, "steps": 80, "metrics": metrics}, at=200.0)
    assert (row.step, row.steps) == (5, 80)
    assert Summary(**row.summary) == Summary(
        reward=0.5,
        tokens_per_second=1200.0,
        staleness=0.25,
        verifier_error_rate=0.01,
        workers=3,
        version="2.5",
        accuracy=0.3,
    )


def test_the_evaluation_at_step_0_is_the_accuracy_before_training() -> None:
    row = job()
    apply(row, {"kind": "evaluation", "step": 0, "greedy": {"mean": 0.2}}, at=200.0)
    apply(row, {"kind": "evaluation", "step": 20, "greedy": {"mean": 0.6}}, at=200.0)
    assert row.summary == {"accuracy_before": 0.2, "accuracy": 0.6}


def test_a_rollback_takes_steps_back() -> None:
    row = job(step=7)
    apply(row, {"kind": "rollback", "to_step": 5, "checkpoint": "step-5"}, at=200.0)
    assert (row.step, row.summary["version"]) == (5, "2.5")


def test_of_conditions_the_newest_of_each_type_is_shown_until_it_is_cleared() -> None:
    row = job()
    apply(row, {"kind": "condition", "condition": "StaleDrops", "rate": 0.0123456}, at=200.0)
    apply(row, {"kind": "condition", "condition": "DiskFull", "reason": "1 GB left", "step": 3}, at=201.0)
    apply(row, {"kind": "condition", "condition": "StaleDrops", "rate": 0.5}, at=202.0)
    assert row.conditions == [
        {"type": "DiskFull", "reason": "1 GB left", "since": 201.0, "step": 3},
        {"type": "StaleDrops", "reason": "rate 0.5", "since": 202.0, "step": 4},
    ]
    apply(row, {"kind": "condition", "condition": "DiskFull", "cleared": True}, at=203.0)
    assert [condition["type"] for condition in row.conditions] == ["StaleDrops"]


def test_each_piece_of_advice_is_shown_until_another_attempt_gives_it_anew() -> None:
    row = job("recovering")
    for reason in ("lower tau", "raise lr", "lower tau"):
        apply(row, {"kind": "condition", "condition": "Advice", "reason": reason}, at=200.0)
    assert [condition["reason"] for condition in row.conditions] == ["raise lr", "lower tau"]
    apply(row, transition("starting"), at=201.0)
    assert row.conditions == []


def test_what_a_killed_driver_could_not_take_back_is_gone_when_the_next_one_starts() -> None:
    row = job("recovering")
    stood = ["DiskFull", "LearnerLost", "Stalled", "Throttled", "NoCapacity", "Quarantined", "LauncherUnavailable"]
    for name in stood:
        apply(row, {"kind": "condition", "condition": name, "reason": "x"}, at=200.0)
    apply(row, transition("starting"), at=201.0)
    assert [condition["type"] for condition in row.conditions] == ["Quarantined", "LauncherUnavailable"]


def test_the_version_of_a_job_is_the_one_that_its_driver_says() -> None:
    row = job()
    apply(row, {"kind": "step", "step": 5, "steps": 60, "version": "2.5.1"}, at=200.0)
    assert row.summary["version"] == "2.5.1"
    apply(row, {"kind": "rollback", "to_step": 4, "checkpoint": "step-4", "version": "2.4.2"}, at=201.0)
    assert row.summary["version"] == "2.4.2"
    apply(row, {"kind": "step", "step": 5, "steps": 60, "version": ["nonsense"]}, at=202.0)
    assert row.summary["version"] == "2.5"


def test_conditions_and_reasons_are_bounded() -> None:
    row = job()
    for number in range(100):
        apply(row, {"kind": "condition", "condition": f"Type {number}", "reason": "x" * 10_000}, at=200.0)
    assert len(row.conditions) == 32
    assert len(row.conditions[-1]["reason"]) == 2000
    apply(row, transition("failed", reason="x" * 10_000), at=200.0)
    assert len(row.reason) == 2000


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(SAID),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "state",
    "reason",
    "result",
    "step",
    "steps",
    "to_step",
    "metrics",
    "greedy",
    "condition",
    "cleared",
    "rate",
    "version",
]


@given(
    kind=st.sampled_from(["transition", "step", "evaluation", "condition", "rollback"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), anything),
    state=st.sampled_from(STATES),
)
def test_no_event_whatever_it_holds_raises_or_makes_a_job_unshowable(
    kind: str, fields: dict[str, Any], state: str
) -> None:
    row = job(state)
    apply(row, {"kind": kind, **fields}, at=200.0)
    assert row.state in STATES
    assert 0 <= row.step < 2**31
    Summary(**row.summary)
    assert all(isinstance(condition["reason"], str) for condition in row.conditions)
