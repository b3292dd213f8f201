"""How fast is the control plane on SQLite and on PostgreSQL, and what bounds it?

Three processes: the service (uvicorn, as `sapo-ray serve` runs it, without reconciler and cluster), a bare FastAPI
route (no key, no checks, no log, an answer that is ready), and a load generator that keeps its connections open and
sends the next request when it has the last answer. Bare route and service are measured by turns. "cpu ms each" is the
service's processor time for one request, page or event: on a busy machine it is the steadiest figure. What bounds each,
as found with cProfile on the event loop and with timers around the store's transactions:

1. Reading a job: the interpreter of the one process (it uses a core; more at once only wait longer). Of 1.7 to 2.5 ms
   the store takes 0.85 (nearly all in SQLAlchemy; SQLite itself 0.05); the rest is FastAPI's dependencies, the line in
   the log (a third of the event loop's time) and the hop to a thread. Submitting: one writer at a time on SQLite, and
   8 ms of processor time: 0.7 for resolving the job, the rest for eight statements and a commit flushed to disk.
2. A page: 0.2 ms for each of its jobs, to decode and check a resolved job, wherever the page lies. Queued jobs show
   their place, for which each page numbers the whole queue in an index: about 15 ms for 10,000 queued jobs.
3. Streams: this process's own ingest wakes the watcher, which then looks at most every 20 ms; events that came in by
   another replica wait for its tick, 0.25 s. Then one look serves all streams, and each is written to in turn.
4. Ingest: in small deliveries the two transactions (whose token is it; store) and the flush; in large ones making JSON
   of each event and inserting it, 0.08 to 0.1 ms. A driver sends a delivery at most every few seconds.

    python benchmarks/control.py [--seconds 1.5] [--database-url URL] [--only sqlite] [--parts rlsi]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from control_service import Postgres, Server, program
from report import report
from sqlalchemy import insert, text

from sapo_ray.config.load import resolve
from sapo_ray.control.store import JobRow, Store, attempts, jobs, keys
from sapo_ray.control.store.tables import new_id

LEVELS = (1, 4, 16, 64)
DRIVERS, STREAMS, LISTED, PAGE = 20, 200, 10_000, 50
BATCHES = (0, 1, 50, 500)
BATCH, EVERY_S = 5, 1.0
"""What each driver delivers while its streams are watched."""
NOTHING = ("per s", "p50 ms", "p99 ms", "cpu ms each")


class Load:
    """The load generator's process."""

    def __enter__(self) -> Load:
        command = [sys.executable, str(Path(__file__).with_name("control_load.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def __call__(self, server: Server, do: str, **options: Any) -> dict[str, Any]:
        """Run a command; adds the processor time that the server needed, in cores."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        cpu = server.cpu()
        self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the load generator died; see above")
        result: dict[str, Any] = json.loads(line)
        if "seconds" in result:
            result["cpu"] = (server.cpu() - cpu) / result["seconds"]
        return result


def row(database: str, what: str, at_once: int, result: dict[str, Any], **over: Any) -> dict[str, Any]:
    """A line of the table. `times` are in seconds."""
    times = sorted(result["times"])
    line = {
        "database": database,
        "what": what,
        "at once": at_once,
        "per s": len(times) / result["seconds"],
        "p50 ms": 1e3 * statistics.median(times),
        "p99 ms": 1e3 * times[min(len(times) - 1, int(0.99 * len(times)))],
        "of bare": "",
        "cpu ms each": 1e3 * result["cpu"] * result["seconds"] / len(times),
        "service cores": round(result["cpu"], 2),
        "load cores": round(result.get("load_cpu", 0.0), 2),
    }
    return line | over


def seed(store: Store, runs: Path) -> dict[str, Any]:
    """Keys, jobs that run with a driver each, 10,000 jobs that have ended, and another tenant's that are queued."""
    spec = resolve({"preset": "quickstart"}).model_dump(mode="json")
    with store.begin() as session:
        secrets = {
            tenant: keys.create_key(session, tenant, "benchmark", ["submit", "read"])[1]
            for tenant in ("work", "ended", "queued")
        }

        def job(tenant: str) -> JobRow:
            return jobs.create_job(
                session,
                tenant=tenant,
                name="benchmark",
                spec=spec,
                steps=60,
                priority=50,
                labels={},
                scale=(1, 1, 1),
                runs_root=runs,
            )

        driven = []
        for _ in range(DRIVERS):
            one = job("work")
            _, token = attempts.begin_attempt(session, one)
            jobs.set_state(session, one, "starting", "launching", allowed={"queued"})
            jobs.set_state(session, one, "running", "launched", allowed={"starting"})
            session.flush()
            driven.append({"id": one.id, "token": token, "newest": one.next_event - 1})
        for tenant, state in (("ended", "succeeded"), ("queued", "queued")):
            model = job(tenant)
            session.flush()
            like = {name: getattr(model, name) for name in JobRow.__table__.columns.keys()}  # noqa: SIM118
            ids = [new_id("job-", model.created_at + n / 1000) for n in range(1, LISTED)]
            model.state = state
            session.execute(insert(JobRow), [like | {"id": id, "state": state} for id in ids])
    with store.begin() as session:
        session.execute(text("ANALYZE"))  # as PostgreSQL does by itself within a minute
    return {"keys": secrets, "driven": driven, "queued": ids[-1]}


def measure_requests(
    load: Load, database: str, service: Server, bare: Server, seeded: dict[str, Any], seconds: float
) -> Iterator[dict[str, Any]]:
    """(1): bare route and service by turns, at each level."""
    paths = [f"/v1/jobs/{job['id']}" for job in seeded["driven"]]
    for kind, what, addresses in (("GET", "read a job", paths), ("POST", "submit a job", ["/v1/jobs"])):
        for at_once in LEVELS:
            options = {"kind": kind, "at_once": at_once, "seconds": seconds}
            plain = load(bare, "requests", port=bare.port, key="", paths=["/bare"], **options)
            full = load(service, "requests", port=service.port, key=seeded["keys"]["work"], paths=addresses, **options)
            first = row(database, f"{kind} of a bare route", at_once, plain)
            yield first
            second = row(database, what, at_once, full)
            yield second | {"of bare": round(second["per s"] / first["per s"], 3)}
    paths = [f"/v1/jobs/{seeded['queued']}"]
    options = {"kind": "GET", "at_once": 4, "seconds": seconds}
    full = load(service, "requests", port=service.port, key=seeded["keys"]["queued"], paths=paths, **options)
    yield row(database, f"read a job, the last of {LISTED} queued", 4, full)


def measure_lists(load: Load, database: str, service: Server, seeded: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """(2): walk through 10,000 jobs twice; pages at the start, in the middle, at the end."""
    for tenant in ("ended", "queued"):
        walks = [load(service, "walk", port=service.port, key=seeded["keys"][tenant], limit=PAGE) for _ in range(2)]
        for found in walks:
            if found["jobs"] != LISTED:
                raise RuntimeError(f"{found['jobs']} of {LISTED} jobs were listed")
        pages, part = len(walks[0]["times"]), len(walks[0]["times"]) // 10
        for where, start in (("start", 0), ("middle", pages // 2 - part // 2), ("end", pages - part)):
            times = [second for found in walks for second in found["times"][start : start + part]]
            shown = walks[0] | {"times": times, "seconds": sum(times)}
            yield row(database, f"page of {PAGE} of {LISTED} {tenant} jobs: {where}", 1, shown)


def measure_streams(
    load: Load, database: str, service: Server, seeded: dict[str, Any], seconds: float
) -> Iterator[dict[str, Any]]:
    """(3): 200 streams on 20 jobs, first while nothing happens, then while events come."""
    driven = seeded["driven"]
    alone = load(service, "idle", seconds=seconds)
    load(service, "open", port=service.port, key=seeded["keys"]["work"], jobs=driven, count=STREAMS)
    load(service, "idle", seconds=2.0)  # until all are at rest
    idle = load(service, "idle", seconds=2 * seconds)
    for what, count, result in (("no stream open", 0, alone), ("streams open, nothing happens", STREAMS, idle)):
        yield row(database, what, count, result | {"times": [0.0]}) | dict.fromkeys(NOTHING, "")
    found = load(
        service, "watch", port=service.port, jobs=driven, batch=BATCH, every_s=EVERY_S, seconds=max(4 * seconds, 5.0)
    )
    load(service, "close")
    if not found["gap_free"]:
        raise RuntimeError("a stream had a gap, or an event twice")
    what = f"event on a stream after its ingest was answered ({DRIVERS} jobs, {BATCH} events every {EVERY_S:g} s)"
    yield row(database, what, STREAMS, found | {"times": found["delays"]})


def measure_ingest(
    load: Load, database: str, service: Server, seeded: dict[str, Any], seconds: float
) -> Iterator[dict[str, Any]]:
    """(4): deliveries of drivers, one after the other, by one driver and by 20."""
    for count in (1, DRIVERS):
        for batch in BATCHES:
            found = load(
                service, "ingest", port=service.port, jobs=seeded["driven"][:count], batch=batch, seconds=seconds
            )
            what = f"events in deliveries of {batch}" if batch else "heartbeats"
            line = row(database, what, count, found)
            events = max(batch, 1)
            yield line | {"per s": line["per s"] * events, "cpu ms each": line["cpu ms each"] / events}


@contextmanager
def databases(given: str | None, only: str | None) -> Iterator[dict[str, str]]:
    """Name and URL of each database to be measured; an empty URL is SQLite."""
    with ExitStack() as stack:
        found = {"sqlite": ""}
        if given:
            found[given.partition(":")[0].partition("+")[0]] = given
        elif only != "sqlite" and program("initdb") and program("postgres"):
            found["postgresql"] = stack.enter_context(Postgres()).url
        yield {name: url for name, url in found.items() if only in (None, name)}


def measure(database: str, url: str, seconds: float, parts: str) -> list[dict[str, Any]]:
    """All rows of one database."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sapo-bench-")))
        url = url or f"sqlite:///{folder / 'control.db'}"
        store = Store(url)
        store.migrate()
        began = time.perf_counter()
        seeded = seed(store, folder / "runs")
        store.close()
        print(f"{database}: {2 * LISTED} jobs were put there in {time.perf_counter() - began:.1f} s", flush=True)
        bare = stack.enter_context(Server("bare", folder))
        service = stack.enter_context(Server("service", folder, str(folder), url))
        load = stack.enter_context(Load())
        rows: list[dict[str, Any]] = []
        if "r" in parts:
            rows += measure_requests(load, database, service, bare, seeded, seconds)
        if "l" in parts:
            rows += measure_lists(load, database, service, seeded)
        if "s" in parts:
            rows += measure_streams(load, database, service, seeded, seconds)
        if "i" in parts:
            rows += measure_ingest(load, database, service, seeded, seconds)
        return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the claims are about."""
    found = {}
    for line in rows:
        if line["of bare"] != "" and line["at once"] == 16:
            found[f"{line['database']}: {line['what']} / bare route, 16 at once"] = line["of bare"]
    pages = {(line["database"], line["what"]): line["p50 ms"] for line in rows if line["what"].startswith("page")}
    for (database, what), median in pages.items():
        if what.endswith("start"):
            heading = what.removesuffix(": start")
            found[f"{database}: {heading}, end / start"] = pages[database, f"{heading}: end"] / median
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each row")
    parser.add_argument("--database-url", help="postgresql+psycopg://..., empty; else a temporary server is started")
    parser.add_argument("--only", choices=["sqlite", "postgresql"])
    parser.add_argument("--parts", default="rlsi", help="r requests, l lists, s streams, i ingest")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with databases(options.database_url, options.only) as found:
        for database, url in found.items():
            rows += measure(database, url, options.seconds, options.parts)
    report("control", rows, ratios(rows))


if __name__ == "__main__":
    main()
