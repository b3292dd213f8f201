"""The number of rollout workers, kept beside the loop: what is wanted of the pool, and what is said about it.

    order      the control plane's newest target, min and max
    autoscale  the policy's decision after a step (rollout.autoscale), within min and max
    capacity   the policy's wish, cut down to what the cluster had room for

The pool starts and drains in the background and the loop goes on meanwhile: it needs to know nothing of this but its
metrics. What is true of the workers at a moment is an event `workers`; what is worth knowing of it is a condition,
taken back when it is over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Literal

from sapo_ray.config.spec import JobSpec, RolloutSpec
from sapo_ray.driver.autoscale import Autoscaler, StepLoad
from sapo_ray.driver.collector import Collector
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.orders import StandingOrders, Wanted
from sapo_ray.driver.parts import Rollouts
from sapo_ray.driver.window import Window
from sapo_ray.types import WorkerCount

LOOK_S = 0.25
"""Between two looks at the orders and at the pool."""
NODE_S = 600.0
"""A cluster that grows may need so long for a node: before that, what it has no room for stays wanted."""
DEFAULT_WAIT = {False: 0.4, True: 0.1}
"""rollout.autoscale_wait if not given, by whether generation and training overlap."""
NUMBERS = ("wanted", "ready", "starting", "pending", "draining", "given_up")


class Scaling:
    """Brings the pool to the number of workers that is wanted. All methods belong to one event loop.

    `changed` is called whenever the workers are others than before.
    """

    def __init__(
        self,
        *,
        spec: JobSpec,
        orders: StandingOrders,
        rollouts: Rollouts,
        journal: Journal,
        changed: Callable[[], None],
    ) -> None:
        rollout = spec.rollout
        self._orders, self._rollouts, self._journal, self._changed = orders, rollouts, journal, changed
        self._wanted = rollout.workers
        self._order = Wanted(least=rollout.min_workers, most=rollout.most_workers, target=rollout.workers)
        """The newest one that was followed."""
        self._autoscaler = autoscaler_of(rollout)
        self._patience = rollout.autoscale_steps
        self._said: WorkerCount | None = None
        self._conditions: dict[str, str] = {}
        """Those that stand, and their reasons."""
        self._moving = False
        """Another number was asked for, and is not reached yet."""
        self._begun = False
        """The minimum was ready once: before that the pool is only starting."""
        self._short_steps = 0
        """In a row, that the cluster had no room for all."""
        self._short_since = 0.0
        """When the first of them ended."""

    async def run(self) -> None:
        """Follow the orders and tell of the workers, until cancelled."""
        try:
            while True:
                self._follow()
                self._tell()
                await asyncio.sleep(LOOK_S)
        finally:
            for condition in list(self._conditions):
                self._condition(condition, None)

    def step(self, load: StepLoad) -> dict[str, float]:
        """Take a step into account; returns its metrics."""
        count = self._rollouts.count()
        if self._autoscaler is not None:
            self._autoscale(self._autoscaler, load, count)
        return {
            "rollout/wait_share": load.wait_share,
            "rollout/busy_share": load.busy_share,
            "rollout/workers_wanted": float(self._wanted),
            "rollout/workers_ready": float(count.ready),
        }

    def _follow(self) -> None:
        """Do what the newest order says, if it says anything new."""
        order = self._orders.workers() or self._order
        if order == self._order:
            return
        target = self._wanted if order.target == self._order.target else order.target
        self._order = order
        self._aim(
            min(max(target, order.least), order.most), "order", f"{order.target} of {order.least} to {order.most}"
        )

    def _autoscale(self, autoscaler: Autoscaler, load: StepLoad, count: WorkerCount) -> None:
        self._short_steps = self._short_steps + 1 if count.pending else 0
        if self._short_steps == 1:
            self._short_since = monotonic()
        short_for_long = self._short_steps > self._patience and monotonic() - self._short_since >= NODE_S
        if short_for_long and count.ready >= self._order.least:
            self._aim(count.ready, "capacity", f"the cluster had no room for more: {count.asked}")
        elif count.ready == self._wanted and not count.draining:
            autoscaler.observe(load)
            if decision := autoscaler.decide(self._wanted, self._order.least, self._order.most):
                self._aim(decision.workers, "autoscale", decision.reason)
        else:
            autoscaler.changed()

    def _aim(self, workers: int, why: Literal["order", "autoscale", "capacity"], reason: str) -> None:
        if workers != self._wanted:
            self._journal.event("scaling", **{"from": self._wanted, "to": workers, "why": why, "reason": reason})
            self._wanted, self._moving, self._short_steps = workers, True, 0
            if self._autoscaler is not None:
                self._autoscaler.changed()
        self._rollouts.scale(workers, self._order.least)

    def _tell(self) -> None:
        """Numbers and conditions, where they are others than before."""
        count = self._rollouts.count()
        if count == self._said:
            return
        self._said = count
        self._changed()
        numbers = {name: getattr(count, name) for name in NUMBERS}
        self._journal.event("workers", **numbers, nodes=list(count.nodes))
        self._begun = self._begun or count.ready >= self._order.least
        reached = count.ready >= count.wanted - count.given_up and not count.draining
        self._moving = self._moving and not reached
        words = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in numbers.items() if number)
        self._condition("ScaleInProgress", words if self._moving else None)
        self._condition(
            "NoCapacity",
            f"the cluster has no room for {count.pending} of {count.wanted} rollout workers ({count.asked}); training "
            f"goes on with {count.ready}, and they join when a node has room"
            if count.pending
            else None,
        )
        self._condition(
            "BelowTarget",
            f"{count.given_up} of {count.wanted} rollout workers were lost too often and are not replaced until the "
            f"job is scaled to another number; the last loss: {count.last_loss}"
            if count.given_up
            else None,
        )
        self._condition(
            "BelowMinimum",
            f"{count.ready} rollout workers are ready, at least {self._order.least} are to be: {words}"
            if self._begun and count.ready < self._order.least
            else None,
        )

    def _condition(self, name: str, reason: str | None) -> None:
        """Make a condition stand, or take it back."""
        standing = self._conditions.get(name)
        if reason == standing:
            return
        if reason is None:
            del self._conditions[name]
            self._journal.event("condition", condition=name, reason=standing, cleared=True)
        else:
            self._conditions[name] = reason
            self._journal.event("condition", condition=name, reason=reason)


def autoscaler_of(rollout: RolloutSpec) -> Autoscaler | None:
    """The policy that a job asks for, if it does."""
    if not rollout.autoscale:
        return None
    overlapped = rollout.max_staleness > 0
    wait = rollout.autoscale_wait or DEFAULT_WAIT[overlapped]
    return Autoscaler(overlapped=overlapped, wait=wait, steps=rollout.autoscale_steps)


class LoadMeter:
    """Measures what steps are like.

    Args:
        seconds: spent in each phase, as the driver counts them.
        collector: knows when completions are under way.
        window: holds the groups.
        batch: groups that a step takes.
    """

    def __init__(self, seconds: Counter[str], collector: Collector, window: Window, batch: int) -> None:
        self._seconds, self._collector, self._window, self._batch = seconds, collector, window, batch
        self._ready = 0.0
        self._last: tuple[float, float, float] | None = None

    def begin(self) -> None:
        """The learner asks for its next batch."""
        self._ready = self._window.complete() / self._batch
        self._last = self._last or self._clocks()

    def end(self) -> StepLoad:
        """The workers have the weights that followed from it."""
        assert self._last is not None, "end without begin"
        now, last = self._clocks(), self._last
        self._last = now
        seconds, waited, busy = (after - before for after, before in zip(now, last, strict=True))
        return StepLoad(seconds=seconds, waited=waited, busy=busy, ready_batches=self._ready)

    def _clocks(self) -> tuple[float, float, float]:
        return monotonic(), float(self._seconds["generation"]), self._collector.busy_seconds()
