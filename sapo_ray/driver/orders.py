"""What the control plane wants of a run, and what the driver does about it.

    order                while the job starts                  afterwards
    pause                ends at once                          the step is finished, nothing more is issued, running
                                                               groups may finish (rollout.group_deadline_s), checkpoint
    cancel               at once, or with the weights of the   the step is finished or, after CANCEL_S, abandoned; the
                         checkpoint, which are exported        newest published weights are exported
    cancel, discard      at once                               the same, without export
    checkpoint_request   -                                     a checkpoint after the step under way
    rollout_workers      followed by scaling.py, beside the loop, whatever that is at

Orders arrive on the link's thread; the loop asks for them between two stages. A wait that an order may cut short is
inside `heeded`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from sapo_ray.api.link import Orders
from sapo_ray.errors import SapoRayError

Ending = Literal["paused", "cancelled"]
"""Ends that are asked for; the states of their transitions."""
Patience = Callable[[Ending], float | None]
"""Seconds that an order leaves a body to finish in; None: all it needs."""
CANCEL_S = 30.0
"""What is left to a step under way when its job is cancelled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Rollout workers: least <= target <= most."""

    least: int
    most: int
    target: int


class Ended(Exception):
    """A body was cut short by an order."""

    def __init__(self, state: Ending) -> None:
        super().__init__(state)
        self.state: Ending = state


@dataclass(kw_only=True, slots=True, eq=False)
class _Watch:
    """A body that orders may cut short."""

    loop: asyncio.AbstractEventLoop
    scope: asyncio.Timeout
    patience: Patience
    ending: Ending | None = None
    """The order that did."""

    def leave(self, seconds: float, ending: Ending | None) -> None:
        """Let it run so much longer; what was left to it before is never extended."""
        end, until = self.loop.time() + seconds, self.scope.when()
        if not self.scope.expired() and (until is None or end < until):
            self.scope.reschedule(end)
            self.ending = ending


class StandingOrders:
    """The newest orders. Without a control plane there are none, and the run goes to its end."""

    def __init__(self, first: Orders | None = None) -> None:
        self._orders = first
        self._served = first.checkpoint_request if first else 0
        self._failure: SapoRayError | None = None
        self.unwanted: SapoRayError | None = None
        """Why the attempt ends as if it were paused though nobody said so."""
        self._watches: list[_Watch] = []
        self._lock = threading.Lock()

    # --- the link's side, on any thread ----------------------------------------------------------------------------

    def receive(self, orders: Orders) -> None:
        """Newer orders take the place of older ones."""
        self._orders = orders
        self._tell_watches()

    def fail(self, failure: SapoRayError) -> None:
        """End the attempt by this error, wherever it is."""
        self._failure = self._failure or failure
        self._tell_watches()

    def release(self, reason: SapoRayError) -> None:
        """Nobody wants the attempt any more, as far as one can tell: it ends as by a pause, and loses no step."""
        self.unwanted = self.unwanted or reason
        self._tell_watches()

    # --- the loop's side -------------------------------------------------------------------------------------------

    @property
    def ending(self) -> Ending | None:
        """How the run is to end before its last step, if it is."""
        if self._orders is None or self._orders.state == "run":
            return None if self.unwanted is None else "paused"
        return "paused" if self._orders.state == "pause" else "cancelled"

    @property
    def served(self) -> bool:
        """A control plane gives them, and looks after the run."""
        return self._orders is not None

    @property
    def discard(self) -> bool:
        """With `cancelled`: nothing needs to be exported."""
        return self._orders is not None and self._orders.discard

    def check(self) -> None:
        """Raise what the attempt is to end with, if anything: for stages that cannot be cut short from outside."""
        if self._failure is not None:
            raise self._failure

    def check_start(self, *, has_checkpoint: bool) -> None:
        """As `check`, and raise Ended where an order ends a start."""
        self.check()
        if (ending := self.ending) is not None and self.start_patience(has_checkpoint=has_checkpoint)(
            ending
        ) is not None:
            raise Ended(ending)

    def start_patience(self, *, has_checkpoint: bool) -> Patience:
        """For the time before weights were published: only weights of a checkpoint are worth an export."""

        def patience(ending: Ending) -> float | None:
            return None if ending == "cancelled" and has_checkpoint and not self.discard else 0.0

        return patience

    @staticmethod
    def step_patience(ending: Ending) -> float | None:
        """A pause finishes its step; a cancelled step may be lost."""
        return CANCEL_S if ending == "cancelled" else None

    def checkpoint_request(self) -> int | None:
        """Number of a request for a checkpoint that is still to be met."""
        newest = self._orders.checkpoint_request if self._orders else 0
        return newest if newest > self._served else None

    def checkpoint_made(self, request: int | None) -> None:
        """A checkpoint that was begun after `request` was seen is visible."""
        self._served = max(self._served, request or 0)

    def workers(self) -> Wanted | None:
        """Rollout workers wanted, if a control plane says so."""
        orders = self._orders
        if orders is None:
            return None
        most = max(orders.rollout_workers, orders.rollout_max or orders.rollout_workers)
        return Wanted(least=orders.rollout_min, most=most, target=orders.rollout_workers)

    @asynccontextmanager
    async def heeded(self, patience: Patience) -> AsyncIterator[None]:
        """Run a body until it is done, or until orders leave it no more time.

        Raises:
            Ended: an order cut it short.
            SapoRayError: what `fail` was given.
        """
        scope = asyncio.timeout(None)
        watch = _Watch(loop=asyncio.get_running_loop(), scope=scope, patience=patience)
        try:
            async with scope:
                with self._lock:
                    self._watches.append(watch)
                self._look()
                try:
                    yield
                finally:
                    with self._lock:
                        self._watches.remove(watch)
        except TimeoutError:
            if not scope.expired():
                raise
            self.check()
            assert watch.ending is not None
            raise Ended(watch.ending) from None

    def _tell_watches(self) -> None:
        with self._lock:
            loops = {watch.loop for watch in self._watches}
        for loop in loops:
            with suppress(RuntimeError):  # the loop ended meanwhile: nothing is left to cut short
                loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """Give every watched body the time that orders leave it; a failure cuts the outermost short."""
        with self._lock:
            watches = list(self._watches)
        if self._failure is not None:
            for outermost in watches[:1]:
                outermost.leave(0.0, None)
            return
        ending = self.ending
        for watch in watches if ending else ():
            assert ending is not None
            if (seconds := watch.patience(ending)) is not None:
                watch.leave(seconds, ending)
