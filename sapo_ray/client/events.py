"""The events of one job as an endless iterator that survives the service: no gap, nothing twice.

           +--------------------- connect, Last-Event-ID: n <----------------------+
           v                                                                       |
server-sent events --- event n+1 ---> yield --- ends the job? ---> ask for the job |
           |                                                        |        |     |
           +-- closed, silent for 45 s, gap ------------------------|--------|-----+
                                                     it has ended   v        v it goes on
                                               the rest by pages, then the end
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator

from pydantic import ValidationError

from sapo_ray.api.jobs import TERMINAL, Event, Job
from sapo_ray.client.errors import BadReply, ConnectionFailed, NotFound, RateLimited, Unavailable
from sapo_ray.client.sse import messages
from sapo_ray.client.transport import Transport
from sapo_ray.errors import DeadlineExceeded

log = logging.getLogger(__name__)

SILENCE_S = 45.0
"""Three heartbeats of the service; a stream that is silent for longer is opened anew."""
GIVE_UP_S = 600.0
"""A service that cannot be reached for so long ends the iterator with an error."""
PAGE = 500
_MAX_GAPS = 5


class Gap(BadReply):
    """An event is missing between two that came."""


class EventStream:
    """Events of one job (`path` is `/v1/jobs/<id>`), from `after` on.

    `until` are the states of the job at which the events end, once all that were stored have come. `deadline` is
    on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        transport: Transport,
        path: str,
        *,
        after: int,
        until: frozenset[str] = TERMINAL,
        deadline: float | None = None,
        deadline_text: str = "",
        silence_s: float = SILENCE_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        self._transport = transport
        self._path = path
        self._last = after
        self._until = until
        self._deadline = deadline
        self._deadline_text = deadline_text
        self._silence_s = silence_s
        self._give_up_s = give_up_s
        self.ended_as: Job | None = None
        """The job as it was found when its events ended."""

    def follow(self) -> Iterator[Event]:
        """Events as they happen.

        Raises:
            DeadlineExceeded: the deadline passed.
            ConnectionFailed, Unavailable, RateLimited: the service could not be reached for 10 minutes.
            BadReply: the service left an event out, again and again.
            NotFound: there is no such job, or it was deleted while its events were read.
            Unauthorized...: what the service said.
        """
        if self._has_ended():
            yield from self.stored()
            return
        try:
            yield from self._as_they_happen()
        except NotFound as error:
            raise NotFound(f"the job was deleted while its events were read ({self._path})", error.problem) from error

    def _as_they_happen(self) -> Iterator[Event]:
        failures = gaps = 0
        contact = time.monotonic()
        while True:
            before = self._last
            wait = None
            try:
                for event in self._connection():
                    failures = gaps = 0
                    yield event
                    contact = time.monotonic()  # after the yield: the caller may have taken long
                    if self._may_end(event) and self._has_ended():
                        break
                if self.ended_as is not None or self._has_ended():
                    yield from self.stored()
                    return
                contact = time.monotonic()
                # Closed in good order while the job goes on: a restart, or a proxy with a limit of its own.
                wait = 0.0 if self._last > before else self._transport.backoff.wait_s(3)
            except Gap:
                gaps += 1
                if gaps >= _MAX_GAPS:
                    raise
                wait = self._transport.backoff.wait_s(gaps)
            except (ConnectionFailed, Unavailable, RateLimited) as error:
                failures += 1
                if self._last > before:
                    failures, contact = 1, time.monotonic()
                if time.monotonic() - contact > self._give_up_s:
                    raise
                wait = self._transport.backoff.wait_s(failures, getattr(error, "retry_after", None))
                log.info("events of %s after %d: %s; again in %.1f s", self._path, self._last, error, wait)
            self._check_deadline()
            time.sleep(min(wait, self._left()))

    def stored(self) -> Iterator[Event]:
        """Events that the service has stored by now, by pages."""
        while True:
            params = {"after": self._last, "limit": PAGE}
            page = self._transport.request("GET", f"{self._path}/events", params=params).json()
            for data in page["data"]:
                event = _event(data)
                if self._is_next(event):
                    yield event
            if not page["has_more"]:
                return
            self._check_deadline()

    def _connection(self) -> Iterator[Event]:
        """Events of one connection, until it is closed or breaks."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self._last), "Accept-Encoding": "identity"}
        silence = min(self._silence_s, self._left() + 0.05)
        with self._transport.stream("GET", f"{self._path}/events", headers=headers, read_timeout=silence) as response:
            for message in messages(response.iter_bytes()):
                self._check_deadline()
                if message is None or not message.data:
                    continue
                try:
                    data = json.loads(message.data)
                except ValueError:
                    raise BadReply(f"{self._path}/events sent what is not JSON: {message.data[:80]!r}") from None
                event = _event(data)
                if self._is_next(event):
                    yield event

    def _is_next(self, event: Event) -> bool:
        if event.id <= self._last:
            return False
        if event.id != self._last + 1:
            raise Gap(
                f"{self._path}/events went from event {self._last} to {event.id}; the service lost what is between"
            )
        self._last = event.id
        return True

    def _may_end(self, event: Event) -> bool:
        return event.kind == "transition" and event.data.get("state") in self._until

    def _has_ended(self) -> bool:
        """Ask for the job: what an event calls failed may be followed by another attempt."""
        job = Job.model_validate(self._transport.request("GET", self._path).json(), extra="ignore")
        if job.status.state in self._until:
            self.ended_as = job
        return self.ended_as is not None

    def _left(self) -> float:
        return float("inf") if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _check_deadline(self) -> None:
        if self._left() <= 0:
            raise DeadlineExceeded(self._deadline_text)


def _event(data: object) -> Event:
    try:
        return Event.model_validate(data, extra="ignore")
    except ValidationError as error:
        raise BadReply(f"the service sent an event that this client cannot read: {error}") from None
