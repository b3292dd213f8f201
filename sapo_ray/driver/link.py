"""The link: a run's events go up to the control plane, its orders come down.

    journal --fsynced events--> Outbox --batch--> control plane --next number, orders--> StandingOrders --> the loop

    every INTERVAL_S, if only with an empty batch, which is the heartbeat; at once after a step or a transition
    no answer            training goes on; the same batch again after a pause, RETRY_S at most
    answer lost, gap     on from the number that the control plane names: each event is stored once, in order
    event refused        after TRIES a note with its number goes in its place, and those behind it follow
    superseded           the journal is fenced, the run ends at once
    token refused        training goes on for REFUSED_S; then the run ends as if it were paused, with a checkpoint

It lives in a thread of its own, because heartbeats must not wait for a warm start or a busy event loop. It ships only
what the journal has on the disk, and sees to it that this is not older than one interval.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from typing import Any

from sapo_ray.api.link import MAX_BATCH, Received
from sapo_ray.diagnosis.vitals import Activity
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.outbox import Outbox
from sapo_ray.driver.wire import CALL_S, Away, Refusals, SequenceGap, TooLarge, Unacceptable, Unauthorized, Wire
from sapo_ray.errors import ResourceError, SapoRayError, Superseded, TrainingFailed

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""Longest pause between two deliveries while the control plane answers; SAPO_LINK_INTERVAL_S sets it."""
FLUSH_S = 60.0
"""What the last events of an attempt may take to be delivered; SAPO_LINK_FLUSH_S sets it."""
RETRY_S = 10.0
"""Longest pause between two attempts while it does not."""
TRIES = 3
"""A batch that was refused so often for what is in it is sent event by event."""
SMALL_FIELD = 500
"""Characters of a field that is kept when one event alone is too large for the control plane."""
URGENT = ("step", "transition")


class Link:
    """One attempt's line to the control plane, from `open` to `close`."""

    def __init__(self, wire: Wire, orders: StandingOrders) -> None:
        self._wire, self._orders = wire, orders
        self._interval = float(os.environ.get("SAPO_LINK_INTERVAL_S", INTERVAL_S))
        self._flush_s = float(os.environ.get("SAPO_LINK_FLUSH_S", FLUSH_S))
        self._next = 1
        self._count = MAX_BATCH
        self._unacceptable = 0
        """Refusals in a row of the batch that is next."""
        self._singly_until = 0
        """Events before this number go one by one."""
        self._refusals = Refusals()
        self._released = False
        self._unwritten = ""
        """Why the journal could not be written the last time."""
        self._wake = threading.Event()
        self._closing_until: float | None = None
        self._away_since: float | None = None
        self._superseded = False
        self._thread: threading.Thread | None = None
        self._journal: Journal
        self._outbox: Outbox

    def open(self, journal: Journal) -> None:
        """Begin to ship what is journalled."""
        self._journal = journal
        self._outbox = Outbox(journal.path, journal.attempt, journal.start)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    def hear(self, event: dict[str, Any]) -> None:
        """Listener of the journal: what is urgent does not wait for the interval."""
        if event["kind"] in URGENT:
            self._wake.set()

    def activity(self) -> list[Activity]:
        """The control plane's part: it is asked for an answer since it last gave one. On any thread."""
        since = self._away_since
        if since is None:
            return []
        at = time.time() - (time.monotonic() - since)
        return [Activity(name="control plane", kind="deliver", task="taking events", since=at, progress=at)]

    def close(self) -> None:
        """Deliver the rest, within the flush bound; say so where that fails. The journal closes after this."""
        if self._thread is None:
            return
        self._closing_until = time.monotonic() + self._flush_s
        self._wake.set()
        self._thread.join(self._flush_s + 2 * CALL_S)
        if not self._superseded and (left := self._journal.seq + 1 - self._next) > 0:
            log.warning(
                "the control plane did not take the last %d events within %g s; they are in %s",
                left,
                self._flush_s,
                self._journal.path,
            )

    # --- on the link's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._ship()
        except Superseded as error:
            self._superseded = True
            self._journal.fence(error)
            self._orders.fail(error)
        except SapoRayError as error:
            self._orders.fail(error)
        except Exception as error:  # the reconciler would take a silent driver for dead: better say so and end
            log.exception("the link failed")
            self._orders.fail(TrainingFailed(f"the link to the control plane failed: {error!r}"))

    def _ship(self) -> None:
        """Deliver until the last event is delivered or the time to flush is over."""
        attempts = 0
        while True:
            try:
                more = self._deliver()
                attempts, pause = 0, self._interval
                self._came_back()
            except Away as error:
                more = False
                attempts, pause = attempts + 1, self._pause(attempts, error)
                self._went_away(error)
            if self._closing_until is not None:
                if self._next > self._journal.seq or self._released or time.monotonic() >= self._closing_until:
                    return
                pause = min(pause, 1.0)
            if not more:
                self._wait(pause)

    def _wait(self, pause: float) -> None:
        """Urgent events cut a pause short, but not one that the control plane asked for by being away."""
        if self._away_since is None or self._closing_until is not None:
            self._wake.wait(pause)
            self._wake.clear()
            return
        end = time.monotonic() + pause
        while (left := end - time.monotonic()) > 0 and self._closing_until is None:
            time.sleep(min(left, 0.1))

    def _deliver(self) -> bool:
        """One batch, or a heartbeat. Returns whether there is more to deliver at once."""
        try:
            self._journal.sync_now()
        except ResourceError as error:  # the run's own writes raise it too; what is on the disk can still be shipped
            if str(error) != self._unwritten:  # a full disk stays full for hours
                log.warning("%s", error)
            self._unwritten = str(error)
        else:
            self._unwritten = ""
        count = 1 if self._next < self._singly_until else self._count
        events = self._outbox.batch(self._next, self._journal.durable, count)
        first = self._next
        try:
            received = self._wire.deliver(first, events)
        except SequenceGap as gap:
            self._go_to(gap.expected)
            if gap.expected == first:
                raise Away(f"it refuses event {first} and asks for it too") from gap
            return True
        except TooLarge as error:
            if len(events) > 1:
                self._count = len(events) // 2
                return True
            received = self._deliver_small(first, events, error)
        except Unacceptable as error:
            received = self._deliver_instead(first, events, error)
        self._unacceptable = 0
        self._refusals.clear()
        self._released = False
        self._count = min(MAX_BATCH, 2 * self._count)
        self._orders.receive(received.orders)
        self._go_to(received.next_seq)
        if events and self._next == first:
            raise Away(f"it answers, but does not store event {first}")
        return bool(events) and self._next <= self._journal.seq

    def _deliver_instead(self, first: int, events: list[dict[str, Any]], error: Unacceptable) -> Received:
        """Find the event that is refused, and send a note of it: those after it must not wait for ever."""
        self._unacceptable += 1
        if not events or (self._unacceptable < TRIES and first >= self._singly_until):
            raise Away(str(error)) from error
        if len(events) > 1:
            self._singly_until = first + len(events)
            raise Away(f"{error}; events {first} to {self._singly_until - 1} are sent one by one") from error
        kept = {key: events[0][key] for key in ("time", "attempt", "seq", "kind", "state") if key in events[0]}
        try:
            received = self._wire.deliver(first, [kept | {"refused": True, "reason": str(error)[:SMALL_FIELD]}])
        except (Unacceptable, TooLarge, SequenceGap) as again:
            raise Away(str(again)) from again
        log.error("the control plane refused event %d (%s): %s", first, events[0].get("kind"), error)
        return received

    def _deliver_small(self, first: int, events: list[dict[str, Any]], error: TooLarge) -> Received:
        """An event that does not fit goes without its long fields: those after it must not wait for ever."""
        if not events:
            raise Away(str(error)) from error
        kept = {key: value for key, value in events[0].items() if len(str(value)) <= SMALL_FIELD}
        try:
            return self._wire.deliver(first, [kept | {"shortened": sorted(events[0].keys() - kept.keys())}])
        except (TooLarge, Unacceptable, SequenceGap) as again:
            raise Away(str(again)) from again

    def _go_to(self, number: int) -> None:
        if number > self._journal.seq + 1:
            raise Superseded(
                f"the control plane holds events up to {number - 1} of attempt {self._journal.attempt}, but this "
                f"driver wrote {self._journal.seq}: another driver of the same attempt is, or was, at work"
            )
        self._next = number

    def _pause(self, attempts: int, error: Away) -> float:
        """Doubling, jittered and bounded; a refused token is counted."""
        if isinstance(error, Unauthorized):
            if self._refusals.add() and not self._released:
                self._release(error)
            return self._interval
        pause = min(RETRY_S, self._interval * 0.1 * 2.0 ** min(attempts, 20))
        if error.retry_after is not None:
            pause = max(pause, min(error.retry_after, RETRY_S))
        return pause * random.uniform(0.7, 1.0)

    def _release(self, error: Unauthorized) -> None:
        """The link goes on meanwhile: a control plane that knows the token again hears how the run ended."""
        self._released = True
        reason = (
            f"the control plane refused this attempt's token for {self._refusals.within_s:g} s and more ({error}): "
            f"attempt {self._journal.attempt} is not wanted any more, and ends with a checkpoint"
        )
        if self._orders.unwanted is None:
            log.error("%s", reason)
            self._journal.event("condition", condition="TokenRefused", reason=reason)
        self._orders.release(Superseded(reason))

    def _went_away(self, error: Away) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning(
                "the control plane does not take events (%s); training goes on, they wait in the journal", error
            )

    def _came_back(self) -> None:
        if self._away_since is not None:
            log.warning("the control plane is back after %.0f s", time.monotonic() - self._away_since)
            self._away_since = None
