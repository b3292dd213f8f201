"""When a part counts as stalled, and who is named of several."""

from __future__ import annotations

import json
from typing import Any

from sapo_ray.diagnosis.vitals import POOL, Component, Vitals, names, parse, patience, replacements, stalls

NOW = 1000.0


def part(name: str, quiet: float, usual: float | None = 2.0, kind: str = "sample", **more: Any) -> Component:
    at = NOW - quiet
    given = {"task": "work", "since": at, "progress": at, "patience": patience(kind, usual, None)} | more
    return Component(name=name, kind=kind, usual=usual, **given)


def record(*components: Component, loop: float | None = NOW - 1, written: float = NOW) -> Vitals:
    return Vitals(
        attempt=1, pid=7, host="h", written=written, loop=loop, phase="training", ended=False, components=components
    )


def named(*components: Component, **more: Any) -> str:
    return names(stalls(record(*components, **more), NOW))


def test_a_part_stalls_after_three_times_what_is_usual_but_not_within_a_hiccup() -> None:
    assert patience("train", usual=100.0, deadline_s=3600) == 300.0
    assert patience("train", usual=0.5, deadline_s=3600) == 15.0
    assert named(part("rollout-0", quiet=14.0, usual=0.5)) == ""
    assert named(part("rollout-0", quiet=16.0, usual=0.5)) == "rollout-0"


def test_before_the_first_is_finished_half_of_the_deadline_is_the_measure_and_a_start_has_two_minutes() -> None:
    assert patience("train", usual=None, deadline_s=3600) == 1800.0
    assert patience("deliver", usual=None, deadline_s=None) == 15.0
    assert patience("start", usual=10.0, deadline_s=900) == 120.0


def test_progress_counts_and_not_how_long_the_work_has_been_going_on() -> None:
    assert named(part("rollout-0", quiet=500.0, progress=NOW - 3)) == ""


def test_several_stalled_parts_are_named_the_longest_quiet_first() -> None:
    assert named(part("rollout-1", 20), part("rollout-0", 30), part("verifier-0", 2)) == "rollout-0, rollout-1"
    assert names([part(f"rollout-{i}", 20) for i in range(5)]) == "rollout-0, rollout-1, rollout-2 and 2 more"


def test_a_pool_that_waits_for_its_worker_is_not_the_culprit() -> None:
    assert named(part(POOL, 40), part("rollout-1", 30)) == "rollout-1"
    assert named(part(POOL, 40)) == POOL


def test_a_pool_that_waits_for_a_worker_to_start_is_not_the_culprit_either_and_the_start_has_its_own_patience() -> None:
    assert named(part(POOL, 40), part("rollout-0.1", 30, kind="start")) == ""
    assert named(part(POOL, 140), part("rollout-0.1", 130, kind="start")) == "rollout-0.1"


def test_a_cluster_without_room_is_named_after_half_a_minute_and_before_those_who_wait_for_it() -> None:
    room = part("cluster", 29, usual=None, kind="place")
    assert named(room, part("learner", 30, usual=None, kind="start")) == ""
    longer = part("cluster", 130, usual=None, kind="place")
    assert named(longer, part("learner", 131, usual=None, kind="start")) == "cluster, learner"


def test_who_starts_in_the_place_of_a_lost_one_is_told_from_who_only_starts() -> None:
    second = part("rollout-0.1", 3, kind="start", after="rollout-0: killed")
    assert replacements(record(part("rollout-1", 9, kind="start"), second, part("learner", 1, kind="train"))) == [
        second
    ]


def test_a_loop_without_heartbeat_is_named_alone() -> None:
    assert named(part("rollout-0", 30), loop=NOW - 20) == "driver"
    assert named(part("model", 2, usual=None, kind="model"), loop=None) == "", "no loop runs yet"


def test_a_control_plane_that_does_not_answer_is_named_after_whoever_keeps_the_training() -> None:
    assert named(part("control plane", 90, None, "deliver"), part("learner", 40, kind="train")).startswith("learner")


def test_an_old_record_is_judged_by_its_own_time() -> None:
    assert named(part("rollout-0", quiet=20.0), written=NOW - 19, loop=NOW - 20) == ""


def test_a_record_is_read_back_as_it_was_written_and_anything_else_is_none() -> None:
    written = record(part("rollout-0", 3), part("learner", 1, usual=None, kind="train"))
    assert parse(written.as_json()) == written
    newer = json.loads(written.as_json()) | {"more": 1}
    newer["components"][0]["gpu"] = 3
    assert parse(json.dumps(newer)) == written
    for damaged in ("", "{", "[]", "null", '{"components":[]}', written.as_json()[:-9]):
        assert parse(damaged) is None
    assert parse(written.as_json().replace('"loop":999.0', '"loop":"x"')) is None
