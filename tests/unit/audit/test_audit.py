"""The auditor: a run of the real driver passes, and each promise that is broken in its files is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from audited import Row, Spoiled, nth, read, record_run, write
from typer.testing import CliRunner

from sapo_ray.audit import Report, audit, books, checkpoints
from sapo_ray.audit.lines import Line
from sapo_ray.audit.versions import Weights
from sapo_ray.cli import app
from sapo_ray.errors import CheckpointError


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("recorded") / "run"
    record_run(run_dir)
    return run_dir


@pytest.fixture
def spoiled(recorded: Path, tmp_path: Path) -> Spoiled:
    return Spoiled.copy(recorded, tmp_path / "run")


def attempt(number: int) -> Any:
    return lambda row: row["attempt"] == number


def of_step(step: int, number: int = 2) -> Any:
    return lambda row: (row["attempt"], row["step"]) == (number, step)


def test_a_run_that_was_killed_and_resumed_passes_and_its_prompts_are_counted(recorded: Path) -> None:
    report = audit(recorded)
    assert report.findings == []
    assert report.passed
    totals = {name: report.totals[name] for name in ("issued", "consumed", "dropped", "outstanding", "void", "steps")}
    # 6 steps of 4, one group dropped; step 5 was taken before the kill, is void, and was taken again.
    assert totals == {"issued": 25, "consumed": 24, "dropped": 1, "outstanding": 0, "void": 4, "steps": 6}
    assert (report.totals["attempts"], report.totals["rollbacks"]) == (2, 1)
    assert report.totals["samples"] == 7 * 16 - 1, "all that were ever trained on, void ones too; one has no verdict"
    unchecked = {key for key, _, checked, _ in report.rows() if checked == 0}
    assert unchecked == set()


def test_a_run_that_was_killed_and_not_taken_up_again_passes_with_a_note(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        del rows[nth(rows, "transition", 0)[0] - 1 :]
    with (spoiled.run_dir / "journal.jsonl").open("a") as file:
        file.write('{"time":1,"attempt":1,"kind":"iss')  # it was writing
    for name in ("step-000006", "latest"):
        path = spoiled.checkpoints / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (spoiled.checkpoints / "latest").write_text("step-000004")
    report = spoiled.audit()
    assert [one for one in report.findings if "2 at least" not in one.what] == []  # step 2 was pruned with step 6
    assert report.notes == ["attempt 1 has no end: it is under way, or was killed and not taken up again"]
    assert report.totals["outstanding"] == 4


def test_a_prompt_that_is_consumed_twice_is_found_with_both_lines(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        before, third = nth(rows, "consumed", where=of_step(3, 1))
        line, fourth = nth(rows, "consumed", where=of_step(4, 1))
        again = next(iter(third["groups"]))
        fourth["groups"] = {again: third["groups"][again], **dict(list(fourth["groups"].items())[1:])}
    assert spoiled.found("I1 prompts", f"{again} was consumed after it had been consumed", before, line)
    assert spoiled.audit().totals["doubled"] == 1


def test_a_prompt_that_is_neither_consumed_nor_dropped_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, last = nth(rows, "consumed", -1)
        lost = list(last["groups"])[2]
        del last["groups"][lost]
    assert spoiled.found("I1 prompts", "step 6 has 3 groups, not 4", line)
    assert spoiled.found("I1 order", f"{lost} overtaken", line)
    assert spoiled.found("I1 prompts", f"succeeded with 1 prompts neither consumed nor dropped: {lost}")
    assert spoiled.audit().totals["lost"] == 1


def test_a_prompt_outstanding_at_the_checkpoint_that_is_not_issued_again_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "issued", -1, lambda row: "restored" in row)
        del rows[line - 1]
    rollback, _ = nth(read(spoiled.run_dir), "rollback")
    text = f"1 prompts outstanding at the checkpoint were not issued again: {row['group']}"
    assert spoiled.found("I1 prompts", text, rollback)


def test_groups_restored_in_another_order_are_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        first, _ = nth(rows, "issued", 0, lambda row: "restored" in row)
        rows[first - 1], rows[first] = rows[first], rows[first - 1]
    assert spoiled.found("I1 rollback", "was restored where", first)


def test_a_sample_of_an_abandoned_lineage_that_is_trained_on_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        consumed, row = nth(rows, "consumed", where=of_step(6))
        group = list(row["groups"])[-1]
        line, _ = nth(rows, "graded", -1, lambda row: row["group"] == group)
        assert rows[line - 1]["attempt"] == 2, "issued after the rollback"
        del rows[line - 1]
    text = f"{group} was consumed without having been graded in the lineage that counts"
    assert spoiled.found("I1 completions", text, consumed - 1)


def test_a_version_that_a_rollback_abandoned_may_not_have_made_a_sample(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        published, _ = nth(rows, "published", where=lambda row: row["version"] == "1.5")
        line, row = nth(rows, "graded", -1, attempt(2))
        row["completions"][0]["spans"][0][0] = "1.5"
    assert spoiled.found("I3 attested", "under version 1.5, which a rollback had abandoned", published, line)


def test_a_sample_that_is_too_old_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        group = next(iter(nth(rows, "consumed", where=of_step(6))[1]["groups"]))
        line, row = nth(rows, "graded", -1, lambda row: row["group"] == group)
        row["completions"][3]["spans"][0][0] = "1.2"
    assert spoiled.found("I2 staleness", f"{group} was trained on at age 3, allowed is 1", line)


def test_tokens_without_a_version_are_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "graded", 3)
        row["completions"][1]["tokens"] += 1
    assert spoiled.found("I2 staleness", f"{row['group']}, completion 1: the versions", line)


def test_more_outstanding_groups_than_the_bound_allows_are_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        for row in rows:
            if row["kind"] == "bounds":
                row["max_staleness"] = 0
    assert spoiled.found("I2 staleness", "t:4:0 was issued beyond the 4 that may be outstanding")


def test_weights_that_a_worker_did_not_take_over_may_not_have_made_a_sample(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        published, row = nth(rows, "published", where=lambda row: row["version"] == "1.2")
        row["workers"] = ["w1"]
    assert spoiled.found("I3 attested", "w0 sampled under version 1.2, which it had not taken over", published)


def test_a_worker_that_was_left_behind_and_has_caught_up_may_have_sampled(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "published", where=lambda row: row["version"] == "1.2")
        row["workers"] = ["w1"]
        caught_up = {"time": 0.0, "attempt": 1, "seq": 0, "kind": "worker", "what": "worker_caught_up"}
        rows.insert(line, caught_up | {"worker": "w0", "version": "1.2"})
    assert spoiled.audit().findings == []


def test_weights_that_failed_their_takeover_may_not_have_made_a_sample(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "published", where=lambda row: row["version"] == "1.2")
        row["workers"] = []
        failed = {"time": 0.0, "attempt": 1, "seq": 0, "kind": "worker", "what": "takeover_failed"}
        rows.insert(line, failed | {"worker": "w0", "version": "1.2", "reason": "1 tensors arrived damaged"})
    assert spoiled.found("I3 attested", "under version 1.2, whose takeover had failed", line + 1)


def test_weights_that_were_never_published_may_not_have_made_a_sample(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "graded", -1)
        row["completions"][0]["spans"][0][0] = "3.5"
    assert spoiled.found("I3 attested", "under version 3.5, which was never published", line)


def test_a_fingerprint_of_two_versions_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        first, old = nth(rows, "published", 1)
        line, row = nth(rows, "published", 2)
        row["fingerprint"] = old["fingerprint"]
    assert spoiled.found("I3 fingerprints", f"version 1.2 has the fingerprint {old['fingerprint']}", first, line)


def test_a_version_with_two_fingerprints_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "published", 2)
        rows.insert(line, row | {"fingerprint": "f" * 16})
    assert spoiled.found("I3 fingerprints", "version 1.2 has two fingerprints", line, line + 1)
    assert spoiled.found("I3 fingerprints", "version 1.2 was published twice", line, line + 1)


def test_a_completion_that_is_trained_on_twice_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "consumed", 0)
        group, samples = next(iter(row["groups"].items()))
        samples.append(samples[1])
    assert spoiled.found("I1 completions", f"{group}: completions [1] were trained on twice", line)
    assert spoiled.audit().totals["samples doubled"] == 1


def test_a_completion_that_is_lost_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "consumed", 0)
        group, samples = next(iter(row["groups"].items()))
        samples.pop()
        graded, other = nth(rows, "graded", 5)
        other["completions"].pop(0)
    assert spoiled.found("I1 completions", f"{group}: completions [3] have a reward and were neither", line)
    assert spoiled.found("I1 completions", "was graded with 3 completions instead of 4: missing [0]", graded)


def test_a_completion_without_a_verdict_that_is_trained_on_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "consumed", where=lambda row: "t:9:0" in row["groups"])
        row["groups"]["t:9:0"].append([0, 0.5])
    assert spoiled.found("I1 completions", "t:9:0: completions [0] were trained on without a reward", line)


def test_an_error_that_became_a_reward_of_zero_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "graded", where=lambda row: row["group"] == "t:9:0")
        row["completions"][0]["reward"] = 0.0
    assert spoiled.found("I6 verdicts", "t:9:0, completion 0 has the verdict 'error' and the reward 0.0", line)


def test_a_group_that_is_graded_twice_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "graded", 2)
        rows.insert(line, dict(row))
    assert spoiled.found("I1 completions", f"{row['group']} was graded twice", line, line + 1)


@pytest.mark.parametrize(("delivered", "again"), [(0, True), (0, False), (3, True)])
def test_a_group_whose_graded_samples_were_lost_has_to_be_graded_again(
    spoiled: Spoiled, delivered: int, again: bool
) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "graded", 2)
        reissued = {key: row[key] for key in ("time", "attempt", "group")} | {
            "kind": "reissued",
            "reason": "a node died",
        }
        rows[line:line] = [{**reissued, "delivered": delivered}, *([dict(row)] if again else [])]
    if delivered:
        assert spoiled.found("I1 completions", f"{row['group']} was graded twice", line, line + 2)
    elif not again:
        assert spoiled.found("I1 completions", f"{row['group']} was consumed without having been graded")
    else:
        assert spoiled.audit().findings == []


def test_groups_that_overtake_each_other_are_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "consumed", 0)
        row["groups"] = dict(reversed(row["groups"].items()))
    assert spoiled.found("I1 order", "step 1: not in their order of issue", line)


def test_a_prompt_that_is_issued_under_two_indices_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        old = nth(rows, "issued", 0)[1]
        line, row = nth(rows, "issued", 12)
        row["group"] = old["group"]
    assert spoiled.found("I1 prompts", "t:0:0 was issued as prompt 12, and before as prompt 0", line)


def test_a_prompt_that_was_skipped_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "issued", 12)
        row["index"] += 1
    assert spoiled.found("I1 order", "t:12:0 has index 13 where 12 is due", line)


def test_a_step_that_was_left_out_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, _ = nth(rows, "consumed", where=of_step(2, 1))
        del rows[line - 1]
    assert spoiled.found("I1 order", "step 3 was taken where 2 is due")


def test_a_drop_without_a_reason_and_a_second_drop_are_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "dropped", 0)
        row["reason"] = ""
        rows.insert(line, dict(row))
    assert spoiled.found("I7 waits", "dropped of t:5:0 without a reason", line)
    assert spoiled.found("I1 prompts", "t:5:0 was dropped while it was not outstanding", line, line + 1)


def test_an_attempt_that_does_not_say_where_it_begins_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, _ = nth(rows, "rollback")
        del rows[line - 1]
    assert spoiled.found("I1 rollback", "attempt 2 went on without saying from where (rollback)", line)


def test_a_rollback_past_the_newest_checkpoint_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        made, _ = nth(rows, "checkpoint", where=of_step(4, 1))
        line, row = nth(rows, "rollback")
        row |= {"to_step": 2, "checkpoint": "step-000002"}
    assert spoiled.found("I4 checkpoints", "rolled back to step 2 past the checkpoint of step 4", made, line)


def test_a_gap_in_the_events_and_a_superseded_writer_are_found(spoiled: Spoiled) -> None:
    with spoiled.rows(number=False) as rows:
        line, _ = nth(rows, "step", 2)
        del rows[line - 1]
        rows.append(dict(nth(rows, "issued", 0)[1]))
    assert spoiled.found("attempts", "events are missing or doubled")
    assert spoiled.found(
        "attempts", "attempt 1 wrote after attempt 2 had taken the run over", len(read(spoiled.run_dir))
    )


def test_training_after_the_end_of_an_attempt_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        end, _ = nth(rows, "transition", -1)
        rows.append({"time": 0.0, "attempt": 2, "kind": "issued", "group": "t:25:0", "index": 25})
    assert spoiled.found("attempts", "attempt 2 went on training after it had succeeded", end, end + 1)


def test_success_without_a_step_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        ended = nth(rows, "transition", -1)[1]
        rows[:] = [nth(rows, "bounds")[1], nth(rows, "published")[1], ended | {"attempt": 1}]
    shutil.rmtree(spoiled.checkpoints)
    assert [one.what for one in spoiled.audit().findings] == ["the run succeeded without a step that counts"]


def test_success_before_the_last_step_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        for row in rows:
            if row["kind"] == "bounds":
                row["steps"] = 7
    assert spoiled.found("I10 success", "the run succeeded after 6 of 7 steps")


def test_a_missing_file_a_flipped_bit_and_a_missing_manifest_are_found(spoiled: Spoiled) -> None:
    path = spoiled.checkpoints / "step-000006" / "learner" / "weights.json"
    content = bytearray(path.read_bytes())
    content[7] ^= 4
    path.write_bytes(content)
    assert spoiled.found("I4 checkpoints", "step-000006: learner/weights.json differs from its hash")
    assert spoiled.found("I4 checkpoints", "`latest` names 'step-000006', which is no whole checkpoint")
    path.unlink()
    assert spoiled.found("I4 checkpoints", "step-000006: learner/weights.json is missing")
    (spoiled.checkpoints / "step-000004" / "manifest.json").unlink()
    assert spoiled.found("I4 checkpoints", "step-000004: manifest.json cannot be read")


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_none(
    spoiled: Spoiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is at work: a newer one was made, and the oldest goes."""
    old = spoiled.checkpoints / "step-000002"
    shutil.copytree(spoiled.checkpoints / "step-000004", old)
    (old / "groups.json").unlink()
    monkeypatch.setattr(checkpoints.time, "sleep", lambda _: shutil.rmtree(old))
    assert spoiled.audit().findings == []


def test_a_pointer_to_nothing_or_to_an_older_checkpoint_and_a_lonely_checkpoint_are_found(spoiled: Spoiled) -> None:
    pointer = spoiled.checkpoints / "latest"
    pointer.write_text("step-000004")
    assert spoiled.found("I4 checkpoints", "`latest` names step-000004, step 6 was made after it")
    pointer.write_text("step-000005")
    assert spoiled.found("I4 checkpoints", "`latest` names 'step-000005', which is no whole checkpoint")
    pointer.unlink()
    assert spoiled.found("I4 checkpoints", "there is no pointer `latest`")
    shutil.rmtree(spoiled.checkpoints / "step-000004")
    assert spoiled.found("I4 checkpoints", "1 whole checkpoints are kept, 2 at least must be")


def test_a_checkpoint_that_forgot_an_outstanding_prompt_is_found(spoiled: Spoiled) -> None:
    """Whole by its hashes, and wrong."""
    folder = spoiled.checkpoints / "step-000004"
    driver = json.loads((folder / "driver.json").read_text())
    forgotten = driver["outstanding"].pop()
    groups = [row for row in json.loads((folder / "groups.json").read_text()) if row["prompt"] != forgotten["prompt"]]
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, content in (("driver.json", driver), ("groups.json", groups)):
        (folder / name).write_text(json.dumps(content))
        digest = hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest()
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "blake2b": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    made, _ = nth(read(spoiled.run_dir), "checkpoint", where=of_step(4, 1))
    assert spoiled.found("I4 cut", f"step-000004 lacks ['{forgotten['prompt']['id']}']", made)


def test_a_quarantine_that_nobody_explains_is_found(spoiled: Spoiled) -> None:
    with spoiled.rows() as rows:
        line, row = nth(rows, "dropped", 0)
        row["reason"] = "quarantined"
    assert spoiled.found("I7 waits", "t:5:0 was quarantined and no condition says why", line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json}", "not a journal line (not JSON"),
        ("[1]", "not a journal line (not a JSON object)"),
        ('{"time":1}', "it has no kind and attempt"),
        ('{"time":1,"attempt":2,"kind":"teleported","group":"t:1:0"}', "'teleported' is not known to this version"),
        ('{"time":1,"attempt":2,"kind":"consumed","step":7}', "consumed without groups"),
        ('{"time":1,"attempt":2,"kind":"consumed","step":"x","groups":{}}', "a consumed line that cannot be read"),
        ('{"time":1,"attempt":3,"kind":"issued","group":"a:1:0","index":1}', "no `bounds` line of attempt 3"),
    ],
)
def test_a_damaged_journal_is_an_error_that_names_line_and_remedy(spoiled: Spoiled, line: str, says: str) -> None:
    with (spoiled.run_dir / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    number = len((spoiled.run_dir / "journal.jsonl").read_text().splitlines())
    result = CliRunner().invoke(app, ["audit", str(spoiled.run_dir)])
    assert result.exit_code == 1
    assert f"journal.jsonl:{number}: " in result.stderr
    assert says in result.stderr
    assert "restore it from a copy" in result.stderr or "audit the run with the version that wrote it" in result.stderr


def test_a_folder_without_a_journal_and_an_empty_journal_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="wants the run directory of a job"):
        audit(tmp_path)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(CheckpointError, match="nothing to audit"):
        audit(tmp_path)


def test_the_command_prints_a_table_or_json_and_exits_by_the_verdict(recorded: Path, spoiled: Spoiled) -> None:
    good = CliRunner().invoke(app, ["audit", str(recorded)])
    assert (good.exit_code, "every promise was kept" in good.stdout) == (0, True)
    assert "prompts: 25 issued, 24 consumed, 1 dropped, 0 outstanding, 4 void, 0 lost, 0 doubled" in good.stdout
    (spoiled.checkpoints / "latest").unlink()
    bad = CliRunner().invoke(app, ["audit", str(spoiled.run_dir), "--json"])
    assert bad.exit_code == 1
    report = json.loads(bad.stdout)
    made, _ = nth(read(recorded), "checkpoint", -1)
    assert report["violations"] == [
        {"invariant": "I4 checkpoints", "what": "there is no pointer `latest`", "lines": [made]}
    ]


def long_journal(path: Path, steps: int) -> None:
    """`steps` steps of four groups from a data set of 100 rows."""
    base = {"time": 0.0, "attempt": 1}
    bounds = {"steps": steps, "prompts": 4, "group_size": 2, "max_staleness": 0, "keep": 2}
    rows: list[Row] = [base | {"kind": "bounds"} | bounds]
    for step in range(steps + 1):
        published = {"version": f"1.{step}", "fingerprint": f"{step:016x}", "workers": ["w0"]}
        rows.append(base | {"kind": "published"} | published)
        if step == steps:
            break
        groups = {f"t:{index % 100}:{index // 100}": index for index in range(4 * step, 4 * step + 4)}
        rows += [base | {"kind": "issued", "group": group, "index": index} for group, index in groups.items()]
        graded = {"worker": "w0", "spans": [[f"1.{step}", 0, 3]], "tokens": 3, "verdict": "wrong", "reward": 0.0}
        completions = [{"i": i, **graded} for i in range(2)]
        rows += [base | {"kind": "graded", "group": group, "completions": completions} for group in groups]
        consumed = {group: [[0, 0.0], [1, 0.0]] for group in groups}
        rows.append(base | {"kind": "consumed", "step": step + 1, "groups": consumed})
    path.mkdir()
    write(path, rows)


def test_who_holds_restored_weights_is_known_however_far_the_abandoned_lineage_had_come(tmp_path: Path) -> None:
    weights = Weights(Report())

    def see(kind: str, **data: Any) -> None:
        weights.see(Line(number=1, attempt=1, kind=kind, seq=None, data=data))

    def publish(version: str) -> None:
        see("published", version=version, fingerprint=version, workers=["w0"])

    see("bounds", max_staleness=1)
    for number in range(100):
        publish(f"1.{number}")
    see("rollback", to_step=10)
    publish("1.10.1")
    for number in range(10, 60):
        publish(f"1.{number + 1}.1")
        assert weights.problem(f"1.{number}.1", "w0") is None
        found = weights.problem(f"1.{number}.1", "w1")
        assert found is not None, number
        assert "which it had not taken over" in found[0]


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "SETTLED", 200)
    peaks = []
    for steps in (500, 2000):
        long_journal(tmp_path / str(steps), steps)
        tracemalloc.start()
        report = audit(tmp_path / str(steps))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.passed, report.findings
        assert report.totals["consumed"] == 4 * steps
    # 6,000 prompts and 1,500 versions more; a version takes about 400 bytes, prompts nothing.
    assert peaks[1] - peaks[0] < 1500 * 1000, peaks
