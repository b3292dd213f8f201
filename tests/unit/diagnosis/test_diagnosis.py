"""What a diagnosis names, for each kind of trouble, from the words that the parts themselves use."""

from __future__ import annotations

from typing import Any

import pytest

from sapo_ray.api.diagnosis import Diagnosis
from sapo_ray.diagnosis import Evidence, diagnose
from sapo_ray.diagnosis.vitals import Component, Vitals

NOW = 10_000.0
OOM = ["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA out of memory."]


def event(kind: str, ago: float, **fields: Any) -> dict[str, Any]:
    return {"time": NOW - ago, "attempt": 1, "kind": kind, **fields}


def found(
    state: str, reason: str = "", *events: dict[str, Any], logs: dict[str, list[str]] | None = None, **known: Any
) -> Diagnosis:
    given = {"now": NOW, "since": NOW - 5, "attempt": 1, "step": 3, "steps": 60, "conditions": [], "vitals": None}
    return diagnose(
        Evidence(
            **{**given, "state": state, "reason": reason, "events": events, **known},
            log=lambda name: (logs or {}).get(name, []),
        )
    )


def vitals(*components: Component, written: float = NOW, loop: float | None = NOW, attempt: int = 1) -> Vitals:
    return Vitals(
        attempt=attempt, pid=7, host="h", written=written, loop=loop, phase="generation", ended=False,
        components=components,
    )  # fmt: skip


def part(name: str, quiet: float, task: str = "sampling 16 completions", **more: Any) -> Component:
    at = NOW - quiet
    given = {"kind": "sample", "usual": 1.2, "patience": 15.0} | more
    return Component(name=name, task=task, since=at, progress=at, **given)


def test_the_engine_that_ran_out_of_memory_is_named_and_not_the_pool_that_failed_for_it() -> None:
    diagnosis = found(
        "failed",
        "TrainingFailed: no rollout worker is left; the last one: rollout-0.3 failed to start",
        event("worker", 90, what="worker_lost", worker="rollout-1", reason="long ago, and replaced"),
        event("step", 80, step=3),
        event("worker", 60, what="worker_lost", worker="rollout-0", reason="rollout-0 died (sample group a:1:0): gone"),
        event("worker", 40, what="worker_lost", worker="rollout-0.1", reason="rollout-0.1 failed to start"),
        event("worker", 6, what="worker_not_replaced", worker="rollout-0.3", reason="lost 4 times within an hour"),
        event("worker", 5, what="pool_failed", worker="rollout pool", reason="no rollout worker is left"),
        logs={"rollout-0.log": OOM, "rollout-0.3.log": ["something else"]},
    )
    assert (diagnosis.verdict, diagnosis.component) == ("failed", "rollout-0")
    assert diagnosis.cause is not None
    assert (diagnosis.cause.code, diagnosis.cause.log, diagnosis.cause.lines) == ("out_of_memory", "rollout-0.log", OOM)
    assert diagnosis.cause.time.timestamp() == NOW - 60
    assert "rollout.max_num_seqs" in diagnosis.remedy


ENDS = [
    ("ModelError: model.path '/models/x' is not a local folder or cached Hub id", "model", "model"),
    ("DataError: data source /d/train.jsonl: no such file; check data.train.0.path", "data", "data"),
    (
        "CheckpointError: no checkpoint of this run can be used: /r/checkpoints/step-000002/learner/w.pt differs from "
        "its hash in the manifest",
        "checkpoint",
        "checkpoint_damaged",
    ),
    (
        "ResourceError: /r/journal.jsonl cannot be written (No space left on device); free some space on its disk",
        "storage",
        "disk_full",
    ),
    ("ResourceError: no room for learner.ranks: 4 within deadlines.start_s (900 s)", "cluster", "no_capacity"),
    (
        "WorkerLost: step 3: learner forward_backward (0,) (deadlines.step_s): rank 1 died: it",
        "learner-1",
        "worker_died",
    ),
    (
        "DeadlineExceeded: step 3: learner prepare (deadlines.step_s): rank [1] not done in time; the learner group is "
        "closed",
        "learner-1",
        "silent",
    ),
    (
        "TrainingFailed: 40 groups in a row could not be used: verifier_errors: 40; the last: timeout",
        "verifier",
        "verifier",
    ),
    ("ConfigError: verifier.reward 'rewards:f' cannot be used: no module named rewards", "verifier", "reward"),
    ("TrainingFailed: no optimizer update was made: each had a gradient that was not finite", "learner", "diverged"),
    (
        "ResourceError: the object store needs 3.10 GB for two buffers of weights, but 2.00 GB of memory and "
        "0.06 GB of /dev/shm are free",
        "cluster",
        "shared_memory",
    ),
    ("WorkerLost: rollout-1 died (start (deadlines.start_s)): The actor died unexpectedly", "rollout-1", "worker_died"),
    ("interrupted by the user", "driver", "interrupted"),
]


@pytest.mark.parametrize(("reason", "component", "code"), ENDS, ids=[code for _, _, code in ENDS])
def test_an_end_names_its_part_and_its_kind_and_says_what_to_do(reason: str, component: str, code: str) -> None:
    diagnosis = found("failed", reason)
    assert diagnosis.cause is not None
    assert (diagnosis.verdict, diagnosis.component, diagnosis.cause.code) == ("failed", component, code)
    assert len(diagnosis.remedy) > 20


def test_what_killed_a_worker_is_read_from_its_own_log() -> None:
    end = "WorkerLost: rollout-0 died (start (deadlines.start_s)): The actor died unexpectedly before finishing"
    diagnosis = found("failed", end, logs={"rollout-0.log": OOM})
    assert diagnosis.cause is not None
    assert (diagnosis.component, diagnosis.cause.code) == ("rollout-0", "out_of_memory")


def test_what_ray_guesses_of_every_dead_actor_is_no_cause() -> None:
    end = (
        "WorkerLost: step 3: learner prepare (deadlines.step_s): rank 0 died: The actor is dead because its worker "
        "process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
        "connection error code 2. End of file. There are some potential root causes. (1) The process is killed by "
        "SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called. (3) The worker is crashed "
        "unexpectedly due to SIGSEGV or other unexpected errors."
    )
    diagnosis = found("failed", end)
    assert diagnosis.cause is not None
    assert (diagnosis.component, diagnosis.cause.code) == ("learner-0", "worker_died")


@pytest.mark.parametrize(
    "words",
    [
        "Available memory on node 0 (17.2/23.4 GiB) on kv cache allocation is less than requested memory for kv (9 G)",
        "Free memory on device cuda:0 (3/80 GiB) on startup is less than desired GPU memory utilization (0.85, 68 GiB)",
        "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "Worker died: the node was running low on memory",
    ],
)
def test_memory_that_is_not_enough_is_known_in_the_words_of_each_library(words: str) -> None:
    diagnosis = found("failed", f"WorkerLost: rollout-0 failed to start (deadlines.start_s):\nValueError: {words}")
    assert diagnosis.cause is not None
    assert (diagnosis.component, diagnosis.cause.code) == ("rollout-0", "out_of_memory")


def test_a_deadline_of_the_loop_is_laid_to_whoever_stalled_then() -> None:
    stalled = event("condition", 300, condition="Stalled", component="verifier-0", reason="no progress for 17 s")
    end = "DeadlineExceeded: waited 3600 s for the next batch of graded groups at step 3; groups under way: ['a']"
    diagnosis = found("interrupted", end, stalled, logs={"verifier-0.log": ["still grading"]})
    assert diagnosis.component == "verifier-0"
    assert diagnosis.cause is not None
    assert (diagnosis.cause.time.timestamp(), diagnosis.cause.lines) == (NOW - 300, ["still grading"])
    over = {**stalled, "time": NOW - 200, "cleared": True}
    assert found("interrupted", end, stalled, over).component == "driver"


def test_a_part_that_does_not_get_on_is_named_with_its_last_lines_and_since_when() -> None:
    known = vitals(part("rollout-0", 41.0), part("verifier-0", 1.0, "grading"))
    diagnosis = found("running", vitals=known, logs={"rollout-0.log": ["INFO ready"]})
    assert (diagnosis.verdict, diagnosis.component) == ("stalled", "rollout-0")
    assert diagnosis.summary == "rollout-0: no progress for 41 s where 1.2 s is usual: sampling 16 completions"
    assert diagnosis.since.timestamp() == NOW - 41
    assert diagnosis.cause is not None
    assert diagnosis.cause.lines == ["INFO ready"]
    assert [(one.name, one.stalled, one.quiet_s) for one in diagnosis.components] == [
        ("rollout-0", True, 41.0),
        ("verifier-0", False, 1.0),
    ]


def test_a_run_that_gets_on_is_healthy_and_its_conditions_are_notes() -> None:
    conditions = [{"type": "VerifierErrors", "reason": "rate 0.08", "since": NOW - 50}]
    diagnosis = found("running", vitals=vitals(part("rollout-0", 2.0)), conditions=conditions)
    assert (diagnosis.verdict, diagnosis.component, diagnosis.remedy) == ("healthy", None, "")
    assert diagnosis.notes == ["VerifierErrors: rate 0.08"]


def test_a_worker_that_is_being_replaced_is_named_with_how_it_was_lost_and_its_own_last_lines() -> None:
    lost = "rollout-0: rollout-0 died (sample group a:1:0): The actor died unexpectedly"
    coming = part("rollout-0.1", 12.0, "starting", kind="start", patience=120.0, after=lost)
    diagnosis = found("running", vitals=vitals(coming, part("rollout-1", 1.0)), logs={"rollout-0.log": OOM})
    assert (diagnosis.verdict, diagnosis.component) == ("waiting", "rollout-0")
    assert diagnosis.summary.startswith("rollout-0 was lost 12 s ago: rollout-0: rollout-0 died")
    assert diagnosis.summary.endswith("rollout-0.1 is starting in its place")
    assert diagnosis.cause is not None
    assert (diagnosis.cause.code, diagnosis.cause.lines) == ("out_of_memory", OOM)
    late = part("rollout-0.1", 130.0, "starting", kind="start", patience=120.0, after=lost)
    assert found("running", vitals=vitals(late)).verdict == "stalled", "the replacement hangs too"


def test_a_learner_rank_that_is_being_replaced_is_named_until_the_new_one_has_begun() -> None:
    reason = "step 3: learner forward_backward (0,) (deadlines.step_s): rank 1 died: the actor is dead"
    lost = {"type": "LearnerLost", "reason": reason, "since": NOW - 8}
    starting = part("learner", 8.0, "starting again", kind="start", patience=120.0)
    diagnosis = found("running", vitals=vitals(starting), conditions=[lost], logs={"learner-1.log": ["Killed"]})
    assert (diagnosis.verdict, diagnosis.component, diagnosis.notes) == ("waiting", "learner-1", [])
    assert diagnosis.since.timestamp() == NOW - 8
    assert "a new learner goes on from the newest checkpoint" in diagnosis.summary
    unwritten = part("learner", 8.0, "starting again", kind="start", patience=120.0, after=reason)
    assert found("running", vitals=vitals(unwritten)).component == "learner-1", "before the journal says so"
    assert diagnosis.cause is not None
    assert (diagnosis.cause.code, diagnosis.cause.lines) == ("worker_died", ["Killed"])


def test_a_driver_that_writes_nothing_any_more_is_named() -> None:
    silent = vitals(part("rollout-0", 35.0), written=NOW - 30, loop=NOW - 31)
    diagnosis = found("running", vitals=silent, last_heard=NOW - 32, served=True)
    assert (diagnosis.verdict, diagnosis.component) == ("stalled", "driver")
    assert "process (7)" in diagnosis.summary


def test_a_driver_that_reports_and_cannot_write_has_trouble_with_its_disk() -> None:
    silent = vitals(written=NOW - 300, loop=NOW - 300)
    diagnosis = found("running", vitals=silent, last_heard=NOW - 2, served=True)
    assert (diagnosis.verdict, diagnosis.component) == ("stalled", "storage")


def test_a_driver_that_never_began_is_the_clusters() -> None:
    assert found("starting", "launching attempt 1", since=NOW - 20, served=True).verdict == "healthy"
    diagnosis = found("starting", "launching attempt 1", since=NOW - 70, served=True)
    assert (diagnosis.verdict, diagnosis.component) == ("stalled", "cluster")
    old = vitals(part("rollout-0", 500.0), attempt=1)
    again = found("starting", "launching attempt 2", since=NOW - 20, served=True, attempt=2, vitals=old)
    assert again.verdict == "healthy", "what the attempt before was at is no matter any more"
    assert again.components == []


def test_a_job_that_waits_says_for_what() -> None:
    limit = found("queued", "2 of at most 2 jobs of this tenant are running", position=3)
    assert (limit.verdict, limit.component) == ("waiting", "queue")
    assert "place 3" in limit.summary
    down = {"type": "LauncherUnavailable", "reason": "the cluster does not answer", "since": NOW - 60}
    cluster = found("queued", "the cluster does not answer", position=1, conditions=[down])
    assert (cluster.verdict, cluster.component, cluster.since.timestamp()) == ("waiting", "cluster", NOW - 60)
    assert found("paused", "asked for").verdict == "waiting"


def test_a_job_held_by_a_full_disk_is_stalled_by_its_storage() -> None:
    full = {"type": "DiskFull", "reason": "0.00 GB free", "since": NOW - 9}
    diagnosis = found("running", conditions=[full], vitals=vitals())
    assert (diagnosis.verdict, diagnosis.component) == ("stalled", "storage")
    assert "free some space" in diagnosis.remedy
    assert "goes on by itself" in diagnosis.remedy


def test_a_job_between_two_drivers_tells_how_the_first_one_ended() -> None:
    reason = "attempt 1 ended without saying why (Ray says FAILED): Job entrypoint command failed"
    diagnosis = found("recovering", reason, logs={"driver.log": ["Killed"]}, served=True)
    assert (diagnosis.verdict, diagnosis.component) == ("waiting", "driver")
    assert diagnosis.cause is not None
    assert diagnosis.cause.lines == ["Killed"]


def test_training_goes_on_without_a_control_plane_and_the_verdict_says_so() -> None:
    away = Component(
        name="control plane", kind="deliver", task="taking events", since=NOW - 40, progress=NOW - 40, usual=None,
        patience=15.0,
    )  # fmt: skip
    diagnosis = found("running", vitals=vitals(away, part("rollout-0", 1.0)))
    assert (diagnosis.verdict, diagnosis.component) == ("stalled", "control plane")
    assert "training goes on without it" in diagnosis.summary


def test_what_ended_well_needs_nothing() -> None:
    for state in ("succeeded", "cancelled"):
        diagnosis = found(state, "all steps were taken")
        assert (diagnosis.verdict, diagnosis.component, diagnosis.remedy) == ("ended", None, "")
