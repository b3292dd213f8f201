"""What must hold of the completions of one group, when they are graded and when they are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapo_ray.audit.books import Graded, Group
from sapo_ray.audit.findings import Report
from sapo_ray.audit.lines import Line
from sapo_ray.audit.versions import Weights, number_of


def check_graded(line: Line, group_size: int, report: Report) -> None:
    """A group is whole or empty (quarantined), every token has a version, and an error is never a reward."""
    group, rows = line.data["group"], line.data["completions"]
    found = [int(row["i"]) for row in rows]
    report.checked["I1 completions"] += len(found)
    report.checked["I6 verdicts"] += len(found)
    if rows and sorted(found) != list(range(group_size)):
        missing, doubled = sorted(set(range(group_size)) - set(found)), len(found) - len(set(found))
        report.totals["samples lost"] += len(missing)
        what = f"{group} was graded with {len(found)} completions instead of {group_size}: missing {missing[:5]}"
        report.violated("I1 completions", what + (f", {doubled} doubled" if doubled else ""), line.number)
    for row in rows:
        _check_row(line, f"{group}, completion {row['i']}", row, report)


def _check_row(line: Line, name: str, row: Mapping[str, Any], report: Report) -> None:
    if (row["verdict"] == "error") != (row["reward"] is None):
        what = f"{name} has the verdict {row['verdict']!r} and the reward {row['reward']}"
        report.violated("I6 verdicts", what, line.number)
    elif row["verdict"] == "error" and not row["reason"]:
        report.violated("I6 verdicts", f"{name} is an error without a reason", line.number)
    ends = [0, *(span[2] for span in row["spans"])]
    starts = [*(span[1] for span in row["spans"]), row["tokens"]]
    if ends != starts:
        what = f"{name}: the versions {row['spans']} do not cover its {row['tokens']} tokens"
        report.violated("I2 staleness", what, line.number)


def check_trained(
    group: Group, samples: list[int], line: Line, max_staleness: int, weights: Weights, report: Report
) -> None:
    """What of a group was trained on: each of its graded completions once, none too old, none of other weights."""
    report.totals["samples"] += len(samples)
    report.checked["I1 completions"] += len(samples)
    graded = group.graded
    if graded is None:
        what = f"{group.id} was consumed without having been graded in the lineage that counts"
        report.violated("I1 completions", what, group.line, line.number)
        return
    doubled = sorted({i for i in samples if samples.count(i) > 1} | (set(samples) & group.nonfinite))
    trainable = {one.i for one in graded.completions if one.trainable}
    strange = sorted(set(samples) - trainable)
    lost = sorted(trainable - set(samples) - group.nonfinite)
    report.totals["samples doubled"] += len(doubled)
    report.totals["samples lost"] += len(lost)
    for found, what in (
        (doubled, "were trained on twice, or trained on and dropped"),
        (strange, "were trained on without a reward"),
        (lost, "have a reward and were neither trained on nor dropped"),
    ):
        if found:
            report.violated("I1 completions", f"{group.id}: completions {found[:5]} {what}", graded.line, line.number)
    _check_versions(group.id, graded, line, max_staleness, weights, report)


def _check_versions(
    name: str, graded: Graded, line: Line, max_staleness: int, weights: Weights, report: Report
) -> None:
    learner = int(line.data["step"]) - 1
    versions = {(version, one.worker) for one in graded.completions for version in one.versions}
    report.checked["I2 staleness"] += len(graded.completions)
    report.checked["I3 attested"] += len(versions)
    age = learner - min((number_of(version) for version, _ in versions), default=learner)
    if age > max_staleness:
        what = f"{name} was trained on at age {age}, allowed is {max_staleness}"
        report.violated("I2 staleness", what, graded.line, line.number)
    if age < 0:
        report.violated("I2 staleness", f"{name} is of a version of the future", graded.line, line.number)
    for version, worker in sorted(versions):
        if problem := weights.problem(version, worker):
            what = f"{name}: {worker} sampled {problem[0]}"
            report.violated("I3 attested", what, problem[1], graded.line, line.number)
