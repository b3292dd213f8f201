"""Stands in for `sapo-ray serve`: the real service, and drivers that only say what drivers say.

`python quickstart_server.py STORY serve --host H --port P --data-dir D`; STORY is `succeeds`, `hangs` (until it is
cancelled), `fails`, or `dies` (the service itself, before it is ready).
"""

from __future__ import annotations

import argparse
import sys
import threading
import time

import uvicorn
from api_server import FakeCluster

from sapo_ray.control.access import first_admin_key
from sapo_ray.control.app import create_app
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import Store, attempts, events, jobs

STEPS = 3


def drive(store: Store, story: str) -> None:
    """Be the driver of the first job that comes."""
    while True:
        with store.read() as session:
            queued = jobs.list_jobs(session, None, state=["queued"], limit=1)
        if queued:
            break
        time.sleep(0.05)
    with store.begin() as session:
        row = jobs.get_job(session, None, queued[0].id, lock=True)
        assert row is not None
        attempt, _ = attempts.begin_attempt(session, row)
        jobs.set_state(session, row, "starting", "launched", allowed={"queued"})
        job_id, number, run_dir = row.id, attempt.number, row.run_dir
    said = 0

    def say(kind: str, **data: object) -> None:
        nonlocal said
        said += 1
        one = {"time": time.time(), "attempt": number, "seq": said, "kind": kind, **data}
        with store.begin() as session:
            events.ingest(session, job_id, number, said, [one])

    say("transition", state="starting", run_dir=run_dir, changes=[])
    say("transition", state="running", attempt_seconds=0.1)
    say("phase", phase="train", step=0, steps=STEPS)
    for step in range(1, STEPS + 1):
        say("step", step=step, steps=STEPS, drops={}, metrics={"reward/mean": 0.5})
    if story == "fails":
        say("transition", state="failed", reason="TrainingFailed: as the test wants it")
        return
    while story == "hangs":
        with store.read() as session:
            now = jobs.get_job(session, None, job_id)
        if now is not None and now.state == "cancelling":
            say("transition", state="cancelled", reason="cancelled after step 3")
            return
        time.sleep(0.05)
    accuracy = {"greedy": {"mean": 0.9, "low": 0.8, "high": 0.95, "prompts": 9, "errors": 0}, "sampled": None}
    result = {"status": "succeeded", "run_dir": run_dir, "export": f"{run_dir}/export", "seconds": {"train": 1.0}}
    result["accuracy"] = {"before": None, "after": accuracy | {"by_source": {}}}
    say("transition", state="succeeded", reason="all steps were taken", result=result)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("story")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data-dir", required=True)
    options = parser.parse_args()
    if options.story == "dies":
        sys.exit("no cluster can be started here")
    settings = Settings(data_dir=options.data_dir, host=options.host, port=options.port)
    store = Store(settings.database_url)
    store.migrate()
    first_admin_key(store, settings)
    threading.Thread(target=drive, args=(store, options.story), daemon=True).start()
    uvicorn.run(create_app(settings, store, FakeCluster()), port=options.port, timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()
