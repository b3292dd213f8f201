"""The records that the ledger keeps of groups and cuts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

SETTLED = 10_000
"""Groups that were consumed or dropped last, whose lines are still known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What counts of a graded completion."""

    i: int
    worker: str
    versions: tuple[str, ...]
    trainable: bool
    """It has a reward: no verifier error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """A group's completions and where they were written down."""

    line: int
    completions: tuple[Completion, ...]


@dataclass(kw_only=True, slots=True)
class Group:
    """An outstanding group."""

    id: str
    index: int
    line: int
    """Where it was issued, in this attempt."""
    graded: Graded | None = None
    dropped: int | None = None
    """Line of its drop; it leaves the books with the consumption that follows."""
    nonfinite: set[int] = field(default_factory=set)
    """Completions that the learner could not use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What a checkpoint stands for."""

    step: int
    line: int
    next_index: int
    consumed: int
    dropped: int
    outstanding: tuple[tuple[str, int, Graded | None], ...]
    """(group, index, grading if complete) in order of issue."""


class Settled:
    """Where the groups that left the books last were consumed or dropped; the oldest are forgotten."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, tuple[str, int, int]] = OrderedDict()

    def add(self, group: str, index: int, how: str, line: int) -> None:
        """`how`: consumed or dropped."""
        self._lines[group] = (how, line, index)
        if len(self._lines) > SETTLED:
            self._lines.popitem(last=False)

    def how(self, group: str) -> str | None:
        """consumed or dropped, if it is still known."""
        found = self._lines.get(group)
        return None if found is None else found[0]

    def line(self, group: str) -> int | None:
        """Where it was settled, if that is still known."""
        found = self._lines.get(group)
        return None if found is None else found[1]

    def void(self, cut: Cut) -> None:
        """Forget what was settled after a cut: by index, those at or after the first outstanding one."""
        first = min((index for _, index, _ in cut.outstanding), default=cut.next_index)
        for group in [group for group, (_, _, index) in self._lines.items() if index >= first]:
            del self._lines[group]


class Epochs:
    """Ids of prompts of the two newest epochs of each source, so that none is issued twice under another index.

    An id is `source:row:epoch`; an epoch ends before the next one of its source begins.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], dict[str, int]] = {}

    def add(self, group: str, index: int) -> int | None:
        """Index under which the id was issued before, or None."""
        source, epoch = _source_and_epoch(group)
        ids = self._seen.setdefault((source, epoch), {})
        self._seen.pop((source, epoch - 2), None)
        before = ids.setdefault(group, index)
        return None if before == index else before

    def void(self, next_index: int) -> None:
        """Forget ids that were issued from this index on."""
        self._seen = {
            key: {group: index for group, index in ids.items() if index < next_index} for key, ids in self._seen.items()
        }


def _source_and_epoch(group: str) -> tuple[str, int]:
    source = group.rsplit(":", 2)[0]
    epoch = group.rpartition(":")[2]
    return source, int(epoch) if epoch.isdecimal() else 0


def read_graded(line: int, rows: list[dict[str, Any]]) -> Graded:
    """The completions of a `graded` line."""
    completions = tuple(
        Completion(
            i=int(row["i"]),
            worker=str(row["worker"]),
            versions=tuple(str(span[0]) for span in row["spans"]),
            trainable=row["reward"] is not None,
        )
        for row in rows
    )
    return Graded(line=line, completions=completions)
