"""The pulse of a run: what every part is at, when it last got on, and how long such work usually takes.

    loop: at(), timed(), the pools' activity() once a second --> Pulse --thread--> vitals.json, condition `Stalled`

The thread needs nothing of the loop, so it still tells when the loop hangs. What counts as stalled is the business of
`sapo_ray.diagnosis.vitals`, which readers of the file share. Nothing here costs more with more tokens or completions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sapo_ray.config.spec import JobSpec
from sapo_ray.diagnosis.vitals import FILE, POOL, Activity, Component, Vitals, names, patience, stalls
from sapo_ray.driver.journal import Journal
from sapo_ray.errors import SapoRayError

log = logging.getLogger(__name__)

BEAT_S = 1.0
WRITE_S = 2.0
CLOSE_S = 5.0
REMEMBERED = 20
"""Durations of each kind of work that `usual` is the median of."""
MOST = 64
"""Parts in one record, those that have been quiet for longest."""
MODEL_S = 1800.0
"""Model and data may come from the Hub, and a warm start is a training of its own."""

Source = Callable[[], list[Activity]]
"""What the parts of a pool are at; cheap, and never waits."""


class Pulse:
    """Kept by one event loop; `open` begins to write it down. Without `open` it is only counted."""

    def __init__(self, deadlines: Mapping[str, float] | None = None) -> None:
        """`deadlines`: bounds of work by its kind, in seconds."""
        self.phase = "start"
        self._deadlines = dict(deadlines or {})
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._usual: dict[str, float] = {}
        self._under_way: dict[object, Activity] = {}
        self._outer: list[Source] = []
        self._seen: list[Activity] = []
        self._group = 0.0
        """When a group last got on."""
        self._beat: float | None = None
        self._told = ""
        self._since = 0.0
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._path: Path
        self._journal: Journal

    # --- on the loop -----------------------------------------------------------------------------------------------

    @contextmanager
    def at(self, name: str, kind: str, task: str, after: str = "") -> Iterator[None]:
        """A part works on something; when it succeeds, how long it took is what is usual.

        `after`: of a start, how the one was lost whose place it takes.
        """
        key, now = object(), time.time()
        self._under_way[key] = Activity(name=name, kind=kind, task=task, since=now, progress=now, after=after)
        try:
            with self.timed(kind):
                yield
        finally:
            del self._under_way[key]

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """As `at`, for work of a part that tells of itself."""
        began = time.monotonic()
        yield
        self.took(kind, time.monotonic() - began)

    def took(self, kind: str, seconds: float) -> None:
        """Work of a kind was finished."""
        self._seconds[kind].append(seconds)
        self._usual[kind] = statistics.median(self._seconds[kind])
        if kind in ("sample", "grade"):
            self._group = time.time()

    async def beat(self, *sources: Source) -> None:
        """Until it is cancelled: the loop runs, and the parts of its pools are asked what they are at."""
        try:
            while True:
                self._seen = [one for source in sources for one in source()]
                self._beat = time.time()
                await asyncio.sleep(BEAT_S)
        except Exception:
            log.exception("the pulse of the loop ended; the run goes on, stalls of its parts are not told any more")
        finally:
            self._seen, self._beat = [], None

    # --- on the thread ---------------------------------------------------------------------------------------------

    def open(self, journal: Journal, *sources: Source) -> None:
        """Begin to write. `sources` may be asked on any thread."""
        self._journal, self._path, self._outer = journal, journal.path.with_name(FILE), list(sources)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the last record. Bounded."""
        if self._thread is not None:
            self._ending.set()
            self._thread.join(CLOSE_S)

    def record(self, now: float, *, ended: bool = False) -> Vitals:
        """What is under way at this moment."""
        working = [*self._under_way.copy().values(), *self._seen, *(one for source in self._outer for one in source())]
        components = sorted((self._component(one) for one in working), key=lambda one: one.progress)
        return Vitals(
            attempt=self._journal.attempt,
            pid=os.getpid(),
            host=platform.node(),
            written=now,
            loop=self._beat,
            phase=self.phase,
            ended=ended,
            components=() if ended else tuple(components[:MOST]),
        )

    def _component(self, one: Activity) -> Component:
        usual = self._usual.get(one.kind)
        return Component(
            name=one.name,
            kind=one.kind,
            task=one.task,
            since=one.since,
            progress=max(one.progress, self._group) if one.name == POOL else one.progress,
            usual=usual,
            patience=patience(one.kind, usual, self._deadlines.get(one.kind)),
            after=one.after,
        )

    def _run(self) -> None:
        trouble = ""
        while True:
            ended = self._ending.wait(WRITE_S)
            try:
                now = time.time()
                record = self.record(now, ended=ended)
                self._write(record)
                self._tell(record, now)
            except (OSError, SapoRayError) as error:  # a full disk, or a run that is another attempt's by now
                if str(error) != trouble:
                    log.warning("the pulse is not written: %s", error)
                trouble = str(error)
            if ended:
                return

    def _write(self, record: Vitals) -> None:
        draft = self._path.with_name(f".{FILE}")
        draft.write_text(record.as_json())
        draft.replace(self._path)

    def _tell(self, record: Vitals, now: float) -> None:
        """Condition `Stalled`: said once, again when it is another part's, and taken back."""
        found = [] if record.ended else stalls(record, now)
        told = names(found)
        if told == self._told:
            return
        before, self._told = self._told, told
        if found:
            self._since = self._since if before else now
            self._journal.event("condition", condition="Stalled", component=told, reason=found[0].story(now))
        elif not record.ended:
            reason = f"{before} goes on after {now - self._since:.0f} s"
            self._journal.event("condition", condition="Stalled", component=before, reason=reason, cleared=True)


@contextmanager
def pulse_of(spec: JobSpec, journal: Journal, source: Source | None) -> Iterator[Pulse]:
    """What an attempt is at, written down while the body runs. `source` may be asked on any thread."""
    pulse = Pulse(deadlines_of(spec))
    pulse.open(journal, *([] if source is None else [source]))
    try:
        yield pulse
    finally:
        pulse.close()


def deadlines_of(spec: JobSpec) -> dict[str, float]:
    """Bounds of a job's kinds of work."""
    rounds = -(-spec.rollout.group_size // spec.verifier.processes)
    return {
        "model": MODEL_S,
        "start": spec.deadlines.start_s,
        "sample": spec.rollout.group_deadline_s,
        "grade": 60.0 + 2 * rounds * spec.verifier.deadline_s,
        "train": spec.deadlines.step_s,
        "publish": spec.deadlines.publish_s,
        "takeover": spec.deadlines.publish_s,
        "checkpoint": spec.deadlines.checkpoint_s,
        "restore": spec.deadlines.checkpoint_s,
        "export": spec.deadlines.checkpoint_s,
        "output": spec.deadlines.output_s,
    }
