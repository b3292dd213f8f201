"""Does the control plane's memory grow while it works?

The service as in control.py (no reconciler, no cluster) on SQLite. Round after round, 20 drivers deliver events in
batches, 40 streams are opened, followed and closed, and jobs are read. After each round its resident size is noted: the
slope by least squares without the first WARM_UP_S, and its standard error. What still grows then is no Python object
(tracemalloc: 5.6 MB throughout, over 30,000 events), so it is what lies below: page caches of up to 20 SQLite
connections, 2 MB each when they are full, and malloc's arenas. No real installation delivers events at this rate: a
job has about one a second.

    python benchmarks/soak_control.py [--minutes 8]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import control
from control_service import Server
from report import report
from soak import slope_of

from sapo_ray.control.store import JobRow, Store

STREAMS = 40
WARM_UP_S = 60.0


class Worker:
    """What is done to the service, and how much of it."""

    def __init__(self, load: control.Load, service: Server, store: Store, seeded: dict[str, Any]) -> None:
        self._load, self._service, self._store, self._seeded = load, service, store, seeded
        self.events = self.requests = 0

    def round(self) -> None:
        """Deliver, follow, read."""
        jobs, options = self._seeded["driven"], {"port": self._service.port, "key": self._seeded["keys"]["work"]}
        found = self._load(self._service, "ingest", port=self._service.port, jobs=jobs, batch=50, seconds=2.0)
        self.events += 50 * len(found["times"])
        with self._store.read() as session:  # each stream begins where its job's events end
            for job in jobs:
                job["newest"] = session.get_one(JobRow, job["id"]).next_event - 1
        self._load(self._service, "open", jobs=jobs, count=STREAMS, **options)
        found = self._load(
            self._service, "watch", port=self._service.port, jobs=jobs, batch=5, every_s=0.5, seconds=2.0
        )
        self.events += 5 * len(found["times"])
        self._load(self._service, "close")
        paths = [f"/v1/jobs/{job['id']}" for job in jobs]
        found = self._load(self._service, "requests", kind="GET", paths=paths, at_once=4, seconds=0.5, **options)
        self.requests += len(found["times"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    control.LISTED = 2
    samples: list[tuple[float, float]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sapo-bench-")))
        store = Store(f"sqlite:///{folder / 'control.db'}")
        stack.callback(store.close)
        store.migrate()
        seeded = control.seed(store, folder / "runs")
        service = stack.enter_context(Server("service", folder, str(folder), f"sqlite:///{folder / 'control.db'}"))
        worker = Worker(stack.enter_context(control.Load()), service, store, seeded)
        began = time.time()
        while time.time() < began + 60 * options.minutes:
            worker.round()
            samples.append((time.time(), service.resident() / 1e6))
    slope, error = slope_of([one for one in samples if one[0] >= began + WARM_UP_S])
    figures = {
        "minutes": (samples[-1][0] - began) / 60,
        "events": float(worker.events),
        "requests": float(worker.requests),
        "MB at the end": samples[-1][1],
        "MB an hour": slope,
        "standard error of that": error,
        "MB for a million events": slope * (samples[-1][0] - began) / 3600 / worker.events * 1e6,
    }
    report("soak_control", [{"minute": (when - began) / 60, "MB": size} for when, size in samples], figures)


if __name__ == "__main__":
    main()
