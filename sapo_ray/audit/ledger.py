"""The auditor's own books of prompts and completions, along the surviving lineage.

issued --> outstanding (in order) --graded--> --consumed or dropped, from the front--> settled
               |                                            |
               '---- checkpoint: a cut of what is outstanding; rollback: back to a cut, the rest is void
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from sapo_ray.audit.books import Cut, Epochs, Graded, Group, Settled, read_graded
from sapo_ray.audit.completions import check_graded, check_trained
from sapo_ray.audit.findings import Report
from sapo_ray.audit.lines import Line
from sapo_ray.audit.versions import Weights, number_of
from sapo_ray.errors import CheckpointError


class Ledger:
    """Sees lines in their order. `step` is the newest that counts, `cuts` those of checkpoints that may be restored."""

    def __init__(self, report: Report, weights: Weights) -> None:
        self._report, self._weights = report, weights
        self._groups: dict[str, Group] = {}
        """In order of issue; what was dropped leaves with the consumption that follows."""
        self._drops: list[Group] = []
        """Those of them that were dropped."""
        self._settled, self._epochs = Settled(), Epochs()
        self._next = 0
        self._attempt = 0
        self._begun: int | None = None
        """The attempt that said where it begins: the first one, or one that journalled a rollback."""
        self._to_restore: list[tuple[str, int, Graded | None]] = []
        self._rollback: int | None = None
        self._given_up: int | None = None
        """Where groups were given up for a rollback that is still to come."""
        self.bounds: Mapping[str, Any] = {}
        """Of the newest attempt."""
        self._most_steps = 0
        self._taken = 0
        """Slots of groups whose consumption no publish has followed yet."""
        self.step = 0
        self.cuts: dict[int, Cut] = {}

    def see(self, line: Line) -> None:
        """The next line."""
        if line.attempt < self._attempt:  # of a driver that was superseded: its lines count for nothing
            return
        if line.attempt > self._attempt:
            self._begun = line.attempt if self._attempt == 0 else self._begun
            self._attempt, self._taken = line.attempt, 0
        match line.kind:
            case "bounds":
                self.bounds = line.data
                self._most_steps = max(self._most_steps, int(line.data["steps"]))
            case "issued":
                self._issue(line)
            case "graded":
                self._grade(line)
            case "reissued" if not line.data["delivered"] and (group := self._groups.get(str(line.data["group"]))):
                group.graded = None  # if it was: what was graded of it went with its node
            case "dropped":
                self._drop(line)
            case "consumed":
                self._consume(line)
            case "published":
                self._publish(line)
            case "checkpoint":
                self._keep_cut(line)
            case "rollback":
                self._roll_back(line)

    # --- one method for each kind of line ---------------------------------------------------------------------------

    def _issue(self, line: Line) -> None:
        group, index = str(line.data["group"]), int(line.data["index"])
        self._must_have_begun(line)
        if line.data.get("restored"):
            self._restore(line, group, index)
            return
        self._nothing_left_to_restore(line)
        self._count("I1 prompts", "issued")
        if group in self._groups:
            self._violated("I1 prompts", f"{group} was issued while it was outstanding", self._groups[group].line, line)
            return
        if (before := self._epochs.add(group, index)) is not None:
            self._violated("I1 prompts", f"{group} was issued as prompt {index}, and before as prompt {before}", line)
        self._report.checked["I1 order"] += 1
        if index != self._next:
            self._violated("I1 order", f"{group} has index {index} where {self._next} is due", line)
        self._next = index + 1
        self._groups[group] = Group(id=group, index=index, line=line.number)
        slots = (int(self.bounds["max_staleness"]) + 1) * int(self.bounds["prompts"])
        if len(self._groups) - len(self._drops) + self._taken > slots:
            self._violated("I2 staleness", f"{group} was issued beyond the {slots} that may be outstanding", line)

    def _restore(self, line: Line, name: str, index: int) -> None:
        """A group that was outstanding at the cut is so again, in its order."""
        self._report.checked["I1 rollback"] += 1
        names = [group for group, _, _ in self._to_restore]
        if name not in names or self._to_restore[0][:2] != (name, index):
            due = f"{names[0]} is" if names else "none is left"
            self._violated("I1 rollback", f"{name} was restored where {due} due", self._rollback, line)
        graded = None
        if name in names:
            _, _, graded = self._to_restore.pop(names.index(name))
        if line.data["complete"] and graded is None:
            self._violated("I1 completions", f"{name} was restored as complete and had not been graded", line)
        if not line.data["complete"]:  # graded while the checkpoint was being written: it is not in there
            graded = None
        self._groups[name] = Group(id=name, index=index, line=line.number, graded=graded)

    def _grade(self, line: Line) -> None:
        name = str(line.data["group"])
        group = self._groups.get(name)
        self._must_have_begun(line)
        if group is None:
            self._violated(
                "I1 completions", f"{name} was graded while it was not outstanding", self._settled.line(name), line
            )
            return
        check_graded(line, int(self.bounds["group_size"]), self._report)
        if group.graded is not None and group.graded.line > group.line:
            self._violated("I1 completions", f"{name} was graded twice", group.graded.line, line)
        group.graded = read_graded(line.number, line.data["completions"])

    def _drop(self, line: Line) -> None:
        name = str(line.data["group"])
        group = self._groups.get(name)
        if group is None or group.dropped is not None:
            before = group.dropped if group else self._settled.line(name)
            self._violated("I1 prompts", f"{name} was dropped while it was not outstanding", before, line)
        elif line.data["reason"] == "rolled_back":
            self._given_up = self._given_up or line.number
        elif "i" in line.data:
            group.nonfinite.add(int(line.data["i"]))
            self._report.totals["samples dropped"] += 1
        else:
            self._nothing_left_to_restore(line)
            self._count("I1 prompts", "dropped")
            group.dropped = line.number
            self._drops.append(group)

    def _consume(self, line: Line) -> None:
        self._must_have_begun(line)
        self._nothing_left_to_restore(line)
        if self._given_up:
            self._violated(
                "I1 rollback", "groups were given up as rolled back, and no rollback came", self._given_up, line
            )
            self._given_up = None
        step, batch = int(line.data["step"]), line.data["groups"]
        if step != self.step + 1:
            self._violated("I1 order", f"step {step} was taken where {self.step + 1} is due", line)
        if len(batch) != int(self.bounds["prompts"]):
            self._violated("I1 prompts", f"step {step} has {len(batch)} groups, not {self.bounds['prompts']}", line)
        self._check_order(line, list(batch))
        for name, samples in batch.items():
            self._consume_group(line, name, [int(sample[0]) for sample in samples])
        for group in self._drops:
            if self._groups.pop(group.id, None) is not None:
                self._settled.add(group.id, group.index, "dropped", group.dropped or 0)
        self._drops = []
        self.step, self._taken = step, len(batch)

    def _check_order(self, line: Line, batch: list[str]) -> None:
        """What leaves is the front of what is outstanding, in that order."""
        self._report.checked["I1 order"] += 1
        front = list(islice(self._groups.values(), len(batch) + len(self._drops)))
        due = [group.id for group in front if group.dropped is None]
        if batch != due and set(batch) <= self._groups.keys():
            overtaken = [name for name in due if name not in batch]
            what = f"{', '.join(overtaken[:3])} overtaken" if overtaken else "not in their order of issue"
            self._violated("I1 order", f"step {line.data['step']}: {what}", *(g.line for g in front[:3]), line)

    def _consume_group(self, line: Line, name: str, samples: list[int]) -> None:
        self._count("I1 prompts", "consumed")
        group = self._groups.pop(name, None)
        if group is None:
            self._report.totals["doubled"] += 1
            how = self._settled.how(name)
            why = f"after it had been {how}" if how else "while it was not outstanding: never issued, or long settled"
            self._violated("I1 prompts", f"{name} was consumed {why}", self._settled.line(name), line)
            return
        if group.dropped is not None:
            self._violated("I1 prompts", f"{name} was consumed after it had been dropped", group.dropped, line)
        self._settled.add(name, group.index, "consumed", line.number)
        check_trained(group, samples, line, int(self.bounds["max_staleness"]), self._weights, self._report)

    def _publish(self, line: Line) -> None:
        self._must_have_begun(line)
        self._taken = 0
        if number_of(line.data["version"]) != self.step:
            self._violated("I1 order", f"version {line.data['version']} was published at step {self.step}", line)

    def _keep_cut(self, line: Line) -> None:
        step = int(line.data["step"])
        self._report.checked["I4 cut"] += 1
        self._report.totals["checkpoints"] += 1
        if step != self.step:
            self._violated("I4 cut", f"a checkpoint of step {step} was made at step {self.step}", line)
        self.cuts[step] = self._cut(line.number)
        for old in sorted(self.cuts)[: -max(2, int(self.bounds["keep"]))]:
            del self.cuts[old]

    def _roll_back(self, line: Line) -> None:
        to_step, name = int(line.data["to_step"]), line.data["checkpoint"]
        self._report.checked["I1 rollback"] += 1
        self._begun, self._rollback, self._taken = line.attempt, line.number, 0
        newest = max(self.cuts, default=0)
        if to_step < newest:
            what = f"rolled back to step {to_step} past the checkpoint of step {newest}"
            self._violated("I4 checkpoints", what, self.cuts[newest].line, line)
        cut = self._find_cut(line, to_step, name)
        self.cuts = {step: kept for step, kept in self.cuts.items() if step <= to_step}
        totals = self._report.totals
        totals.update({"rollbacks": 1, "void": totals["consumed"] - cut.consumed})
        totals["consumed"], totals["dropped"] = cut.consumed, cut.dropped
        totals["issued"] = cut.consumed + cut.dropped + len(cut.outstanding)
        self._settled.void(cut)
        self._epochs.void(cut.next_index)
        self.step, self._next = cut.step, cut.next_index
        self._groups, self._drops, self._given_up = {}, [], None
        self._to_restore = list(cut.outstanding)

    def _find_cut(self, line: Line, to_step: int, name: str | None) -> Cut:
        """The cut that an attempt goes back to."""
        if name is None:
            if to_step != 0:
                self._violated("I1 rollback", f"back to step {to_step} without a checkpoint", line)
            return Cut(step=0, line=line.number, next_index=0, consumed=0, dropped=0, outstanding=())
        if (cut := self.cuts.get(to_step)) is not None:
            return cut
        if to_step != self.step:
            self._violated("I1 rollback", f"back to {name}, which no line says was made", line)
        # Killed between the checkpoint's becoming visible and its line: it is of what was outstanding then.
        self.cuts[to_step] = self._cut(line.number)
        return self.cuts[to_step]

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self, *, succeeded: bool) -> None:
        """After the last line."""
        totals = self._report.totals
        totals["steps"] = self.step
        totals["outstanding"] = len(self._groups) - len(self._drops) + len(self._to_restore)
        cut_short = int(self.bounds.get("steps", 0)) < self._most_steps  # by a resume: what was issued ahead is left
        if succeeded and totals["outstanding"] and not cut_short:
            left = list(self._groups.values())[:3]
            totals["lost"] += totals["outstanding"]
            what = f"the run succeeded with {totals['outstanding']} prompts neither consumed nor dropped: "
            self._violated("I1 prompts", what + ", ".join(one.id for one in left), *(one.line for one in left))

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _must_have_begun(self, line: Line) -> None:
        if not self.bounds or self.bounds["attempt"] != line.attempt:
            raise CheckpointError(
                f"journal.jsonl:{line.number}: no `bounds` line of attempt {line.attempt} is before it; the journal is "
                "of an earlier version of sapo-ray, or damaged: audit with that version, or restore it from a copy"
            )
        if self._begun != line.attempt:
            self._begun = line.attempt
            self._violated("I1 rollback", f"attempt {line.attempt} went on without saying from where (rollback)", line)

    def _nothing_left_to_restore(self, line: Line) -> None:
        if self._to_restore:
            names = ", ".join(group for group, _, _ in self._to_restore[:3])
            self._report.totals["lost"] += len(self._to_restore)
            self._violated(
                "I1 prompts",
                f"{len(self._to_restore)} prompts outstanding at the checkpoint were not issued again: {names}",
                self._rollback,
                line,
            )
            self._to_restore = []

    def _cut(self, line: int) -> Cut:
        totals = self._report.totals
        return Cut(
            step=self.step,
            line=line,
            next_index=self._next,
            consumed=totals["consumed"],
            dropped=totals["dropped"],
            outstanding=tuple((g.id, g.index, g.graded) for g in self._groups.values() if g.dropped is None),
        )

    def _count(self, invariant: str, total: str) -> None:
        self._report.checked[invariant] += 1
        self._report.totals[total] += 1

    def _violated(self, invariant: str, what: str, *lines: int | Line | None) -> None:
        numbers = (line.number if isinstance(line, Line) else line for line in lines)
        self._report.violated(invariant, what, *numbers)
