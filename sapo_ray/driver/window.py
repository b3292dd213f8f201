"""The window of outstanding groups, in issue order.

A group takes a slot when it is issued and gives it back when it is dropped, or after the publish that follows its
consumption has reached the workers. With (max_staleness + 1) batches of slots, the group consumed at step s was issued
no earlier than version s - max_staleness: the bound holds by construction, not by luck.

Order is everything here: which groups make a batch depends on the order of issue, never on the order of arrival.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sapo_ray.driver.collector import GradedGroup
from sapo_ray.types import Prompt


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entry:
    """One outstanding group."""

    prompt: Prompt
    task: asyncio.Future[GradedGroup]
    """Of its collecting."""


@dataclass(kw_only=True, slots=True)
class Window:
    """Outstanding groups; `capacity` slots. Entries are consumed or dropped from the front, each in constant time."""

    capacity: int
    _waiting: deque[Entry] = field(default_factory=deque)
    """Not yet in a batch, in issue order."""
    _batch: list[Prompt] = field(default_factory=list)
    """Of the batch that is being trained on."""
    _trained: int = 0
    """Groups that were trained on; the workers do not have the weights yet, so their slots are still taken."""

    def __len__(self) -> int:
        """Slots that are taken."""
        return len(self._waiting) + len(self._batch) + self._trained

    def free(self) -> int:
        """Slots that nothing holds."""
        return self.capacity - len(self)

    def waiting(self) -> list[Entry]:
        """Entries not yet in a batch, in issue order."""
        return list(self._waiting)

    def complete(self) -> int:
        """Groups that could be in a batch now."""
        return sum(entry.task.done() for entry in self._waiting)

    def outstanding(self) -> list[Prompt]:
        """Prompts that were issued and neither trained on nor dropped, in issue order."""
        return [*self._batch, *(entry.prompt for entry in self._waiting)]

    def first(self) -> Entry:
        """The waiting entry that was issued first."""
        return self._waiting[0]

    def issue(self, prompt: Prompt, start: Callable[[], asyncio.Future[GradedGroup]]) -> None:
        """Take a slot for `prompt` and start collecting it."""
        assert self.free() > 0, "no free slot"
        self._waiting.append(Entry(prompt=prompt, task=start()))

    def consume(self) -> None:
        """The first waiting group is in the batch now."""
        self._batch.append(self._waiting.popleft().prompt)

    def take_back(self, groups: Sequence[GradedGroup]) -> None:
        """The batch, which is of these groups, is not trained on: they wait again, before all others."""
        assert [group.prompt for group in groups] == self._batch, "not the batch"
        for group in reversed(groups):
            task = asyncio.get_running_loop().create_future()
            task.set_result(group)
            self._waiting.appendleft(Entry(prompt=group.prompt, task=task))
        self._batch = []

    def graded(self) -> list[tuple[Prompt, GradedGroup]]:
        """Groups that could be in a batch now, in issue order."""
        ready = (entry for entry in self._waiting if entry.task.done() and not entry.task.cancelled())
        return [(entry.prompt, entry.task.result()) for entry in ready if entry.task.exception() is None]

    def collect_again(self, prompt: Prompt, start: Callable[[], asyncio.Future[GradedGroup]]) -> None:
        """What was graded of a waiting prompt is of no use any more; it keeps its place."""
        [place] = [i for i, entry in enumerate(self._waiting) if entry.prompt.id == prompt.id]
        self._waiting[place] = Entry(prompt=prompt, task=start())

    def trained(self) -> None:
        """The batch was trained on."""
        self._trained, self._batch = len(self._batch), []

    def drop(self) -> None:
        """Give the first waiting group's slot back without training on it."""
        self._waiting.popleft().task.cancel()

    def release(self) -> None:
        """Give the slots of consumed groups back: the workers have the weights that followed from them."""
        self._trained = 0

    async def cancel(self) -> None:
        """End all collecting; used when the driver stops."""
        tasks = [entry.task for entry in self._waiting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._waiting.clear()
        self._batch, self._trained = [], 0
