"""A run of the real driver on fake pools, killed once and resumed, whose journal tests may spoil."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import Bench, FakeLearner, FakeVerifiers, job

from sapo_ray.audit import Report, audit
from sapo_ray.errors import WorkerLost

Row = dict[str, Any]


def record_run(run_dir: Path) -> None:
    """Six steps of four groups of four, one step ahead; the learner dies in step 5, four is the newest checkpoint.

    Group t:5:0 is dropped for its verifier errors; t:9:0 has one, and three completions that count.
    """
    run_dir.mkdir()
    spec = job(steps=6, rollout__max_staleness=1, checkpoint={"every": 2, "min_free_gb": 0})
    first = Bench(run_dir, spec, verifiers=FakeVerifiers(errors={"5": 4, "9": 1}), learner=FakeLearner(fail_at=6))
    with suppress(WorkerLost):
        asyncio.run(first.attempt(1))
    asyncio.run(first.next_life().attempt(2))
    rows = read(run_dir)
    lived, ended = ({"seq": 0, "attempt": attempt, "time": 0.0, "kind": "transition"} for attempt in (1, 2))
    lived |= {"state": "interrupted", "reason": "WorkerLost: learner rank 0 died"}
    ended |= {"state": "succeeded", "reason": "all steps were taken"}
    cut = next(place for place, row in enumerate(rows) if row["attempt"] == 2)
    write(run_dir, [*rows[:cut], lived, *rows[cut:], ended])


def read(run_dir: Path) -> list[Row]:
    return [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]


def write(run_dir: Path, rows: list[Row], *, number: bool = True) -> None:
    """Events are numbered anew, so that a line may be added or taken away without more being wrong than that."""
    seqs: dict[int, int] = {}
    for row in rows:
        if number and "seq" in row:
            row["seq"] = seqs[row["attempt"]] = seqs.get(row["attempt"], 0) + 1
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Spoiled:
    """A copy of the run that a test changes."""

    run_dir: Path

    @classmethod
    def copy(cls, of: Path, to: Path) -> Spoiled:
        shutil.copytree(of, to)
        return cls(to)

    @contextmanager
    def rows(self, *, number: bool = True) -> Iterator[list[Row]]:
        """The journal's rows, written back afterwards."""
        rows = read(self.run_dir)
        yield rows
        write(self.run_dir, rows, number=number)

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def audit(self) -> Report:
        return audit(self.run_dir)

    def found(self, invariant: str, text: str, *lines: int) -> bool:
        """Whether there is a violation of `invariant` that has `text` and shows all of these lines."""
        findings = self.audit().findings
        return any(one.invariant == invariant and text in one.what and set(lines) <= set(one.lines) for one in findings)


def nth(rows: list[Row], kind: str, place: int = 0, where: Callable[[Row], bool] = lambda _: True) -> tuple[int, Row]:
    """(line number, row) of a row of a kind; -1 is the last."""
    found = [(number, row) for number, row in enumerate(rows, 1) if row["kind"] == kind and where(row)]
    return found[place]
