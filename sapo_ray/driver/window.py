"""The window of outstanding groups, in issue order.

A group takes a slot when it is issued and gives it back when it is dropped, or after the publish that follows its
consumption has reached the workers. With (max_staleness + 1) batches of slots, the group consumed at step s was issued
no earlier than version s - max_staleness: the bound holds by construction, not by luck.

Order is everything here: which groups make a batch depends on the order of issue, never on the order of arrival.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from sapo_ray.driver.collector import GradedGroup
from sapo_ray.types import Prompt


@dataclass(kw_only=True, slots=True, eq=False)
class Entry:
    """One outstanding group."""

    prompt: Prompt
    task: asyncio.Task[GradedGroup]
    consumed: bool = False
    """In the batch that is being trained on; its slot is still taken."""


@dataclass(kw_only=True, slots=True)
class Window:
    """Outstanding groups; `capacity` slots."""

    capacity: int
    entries: list[Entry] = field(default_factory=list)

    def free(self) -> int:
        """Slots that nothing holds."""
        return self.capacity - len(self.entries)

    def waiting(self) -> list[Entry]:
        """Entries not yet in a batch, in issue order."""
        return [entry for entry in self.entries if not entry.consumed]

    def issue(self, prompt: Prompt, start: Callable[[], asyncio.Task[GradedGroup]]) -> None:
        """Take a slot for `prompt` and start collecting it."""
        assert self.free() > 0, "no free slot"
        self.entries.append(Entry(prompt=prompt, task=start()))

    def drop(self, entry: Entry) -> None:
        """Give a slot back without training on the group."""
        entry.task.cancel()
        self.entries.remove(entry)

    def release(self) -> None:
        """Give the slots of consumed groups back: the workers have the weights that followed from them."""
        self.entries = self.waiting()

    async def cancel(self) -> None:
        """End all collecting; used when the driver stops."""
        tasks = [entry.task for entry in self.entries]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.entries = []
