"""Event streams: every stream reads what the store holds, and one look at the store serves them all.

Watcher (one task)  -- every tick, and when this process has stored events of a watched job (`nudge`): newest event ids
      |                 of all watched jobs; then the new events, once per job
      |                 (store gone: wait and look again, nothing is lost)
      v  told
stream (one per connection)  -- events after its own position: from the tail the watcher read, else from the store
      |
      v  ends after the last event of a job that has ended, or when the connection does
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field

import structlog
from sse_starlette import ServerSentEvent
from starlette.concurrency import run_in_threadpool

from sapo_ray.api.jobs import TERMINAL
from sapo_ray.control import views
from sapo_ray.control.problems import Refused
from sapo_ray.control.store import EventRow, Store, StoreUnavailable, events, jobs

log = structlog.get_logger("sapo_ray.control.watch")

PAGE = 500
TAIL = 1000
"""Events of a watched job kept for its streams; whoever is further behind reads the store."""
LONGEST_RETRY_S = 5.0
LEAST_PAUSE_S = 0.02
"""Between two looks, however often the watcher is nudged: drivers that deliver in one moment share a look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """An event ready to be sent."""

    id: int
    text: str
    """JSON of the event."""
    may_end: bool
    """Tells of a state in which jobs end."""


@dataclass(kw_only=True, slots=True)
class _Watched:
    """A job that somebody watches."""

    streams: int = 0
    told: int | None = None
    """Newest event that the watcher knows of; None before its first look."""
    tail: deque[Line] = field(default_factory=lambda: deque(maxlen=TAIL))
    """Newest events, contiguous up to `told`."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Replaced each time that it is set."""
    gone: bool = False
    """The job is not there any more."""

    def after(self, position: int) -> list[Line] | None:
        """Events beyond `position`, if the tail reaches back that far."""
        if not self.tail or self.tail[0].id > position + 1:
            return None
        return [line for line in self.tail if line.id > position]


class Watcher:
    """All event streams of this process."""

    def __init__(self, store: Store, *, interval_s: float, most_per_tenant: int) -> None:
        self._store = store
        self._interval_s = interval_s
        self._most_per_tenant = most_per_tenant
        self._jobs: dict[str, _Watched] = {}
        self._tenants: Counter[str] = Counter()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nudged = asyncio.Event()

    @property
    def open_streams(self) -> int:
        """Streams of all tenants."""
        return self._tenants.total()

    def admit(self, tenant: str) -> None:
        """Raises Refused (429) if the tenant has as many streams as it may."""
        if self._tenants[tenant] >= self._most_per_tenant:
            raise Refused(
                429,
                "rate_limited",
                f"{self._most_per_tenant} event streams are open already",
                hint="close some, or read events by pages",
                headers={"Retry-After": "10"},
            )

    async def stream(
        self, tenant: str, job_id: str, after: int, revoked: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[ServerSentEvent, None]:
        """Events beyond `after`, in order and without a gap, until the job has ended and all were sent.

        Or until `revoked`: whoever brings that about calls `wake`.
        """
        with self._watch(tenant, job_id) as watched:
            yield ServerSentEvent(retry=2000, comment="events of " + job_id)
            position, failures, look = after, 0, True
            while not revoked():
                news = watched.news
                look = look or watched.gone
                known = watched.after(position)
                if known is not None and not look:
                    lines = known
                else:
                    try:
                        lines, ended = await run_in_threadpool(self._read, job_id, position)
                    except StoreUnavailable:
                        failures += 1
                        yield ServerSentEvent(comment="the job store does not answer; events follow when it does")
                        await asyncio.sleep(min(LONGEST_RETRY_S, self._interval_s * 2**failures))
                        continue
                    failures, look = 0, len(lines) == PAGE
                    if ended and not lines:
                        return
                for line in lines:
                    if revoked():
                        return
                    yield ServerSentEvent(data=line.text, id=str(line.id), sep="\n")
                    position = line.id
                    look = look or line.may_end
                if not look and not watched.gone and (watched.told is None or watched.told <= position):
                    await news.wait()

    def nudge(self, job_id: str) -> None:
        """Events of the job were stored just now: look at once if anybody watches it. From any thread."""
        if job_id in self._jobs and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._nudged.set)

    def wake(self, job_id: str) -> None:
        """Let the job's streams look whether they still may go on. On the loop's thread."""
        watched = self._jobs.get(job_id)
        if watched is not None:
            watched.news.set()
            watched.news = asyncio.Event()

    async def close(self) -> None:
        """End the task; streams end with their connections."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @contextlib.contextmanager
    def _watch(self, tenant: str, job_id: str) -> Iterator[_Watched]:
        watched = self._jobs.setdefault(job_id, _Watched())
        watched.streams += 1
        self._tenants[tenant] += 1
        if self._task is None or self._task.done():
            self._loop, self._nudged = asyncio.get_running_loop(), asyncio.Event()
            self._task = asyncio.create_task(self._run(), name="event watcher")
        try:
            yield watched
        finally:
            watched.streams -= 1
            self._tenants[tenant] -= 1
            if watched.streams == 0:
                self._jobs.pop(job_id, None)

    async def _run(self) -> None:
        """Look for news as long as anybody watches."""
        failures = 0
        while self._jobs:
            self._nudged.clear()
            try:
                await self._look()
                failures = 0
            except StoreUnavailable as error:
                failures += 1
                if failures == 1:
                    log.warning("event streams wait for the job store", reason=str(error)[:300])
            except Exception:
                failures += 1
                log.exception("the event watcher failed; it goes on")
            pause = min(LONGEST_RETRY_S, self._interval_s * 2 ** min(failures, 10))
            least = pause if failures else min(pause, LEAST_PAUSE_S)
            await asyncio.sleep(least)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause - least):
                    await self._nudged.wait()

    async def _look(self) -> None:
        positions = {job_id: watched.told for job_id, watched in self._jobs.items()}
        found, gone = await run_in_threadpool(self._news, positions)
        for job_id in gone:  # deleted: its streams read what is left, which is nothing, and end
            if (watched := self._jobs.get(job_id)) is not None:
                watched.gone = True
                watched.news.set()
        for job_id, (newest, lines) in found.items():
            watched = self._jobs.get(job_id)
            if watched is None or watched.told != positions[job_id]:
                continue
            if lines and lines[0].id != (watched.told or 0) + 1:
                watched.tail.clear()
            watched.tail.extend(lines)
            watched.told = newest
            self.wake(job_id)

    def _news(self, positions: dict[str, int | None]) -> tuple[dict[str, tuple[int, list[Line]]], set[str]]:
        """Jobs with events beyond what was told: the newest id now known, and the events in between. And jobs gone."""
        found: dict[str, tuple[int, list[Line]]] = {}
        with self._store.read() as session:
            ids = events.newest_ids(session, list(positions))
            for job_id, newest in ids.items():
                told = positions[job_id]
                if told is None:
                    found[job_id] = newest, []
                elif newest > told:
                    lines = [_line(row) for row in events.list_events(session, job_id, told, PAGE)]
                    if lines:
                        found[job_id] = lines[-1].id, lines
        return found, positions.keys() - ids.keys()

    def _read(self, job_id: str, position: int) -> tuple[list[Line], bool]:
        """A page of events beyond `position`, and whether the job had ended before they were read."""
        with self._store.read() as session:
            row = jobs.get_job(session, None, job_id)
            ended = row is None or row.state in TERMINAL
            return [_line(one) for one in events.list_events(session, job_id, position, PAGE)], ended


def _line(row: EventRow) -> Line:
    may_end = row.kind == "transition" and row.data.get("state") in TERMINAL
    return Line(id=row.id, text=views.event(row).model_dump_json(), may_end=may_end)
