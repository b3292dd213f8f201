"""The client against the real service, in a process of its own that is killed and comes back."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import ADMIN_KEY, PLAIN, ServerProcess

from sapo_ray import client as api
from sapo_ray.client import Client
from sapo_ray.client.retry import Backoff
from sapo_ray.control.store import Store, attempts, jobs

pytestmark = pytest.mark.slow

STARTS_WITHIN_S = 60.0
SPEC = {"preset": "quickstart", "steps": 40}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("service")
    with ServerProcess(folder, f"sqlite:///{folder / 'control.db'}") as one:
        yield one


@pytest.fixture
def client(service: ServerProcess) -> Iterator[Client]:
    with Client(service.url, ADMIN_KEY) as one:
        one._transport.backoff = Backoff(first_s=0.05, longest_s=0.3)
        yield one


class Driver:
    """Plays the driver of a job: the store is told that one was launched, the events go over the link."""

    def __init__(self, service: ServerProcess, job_id: str) -> None:
        store = Store(service.database_url)
        with store.begin() as session:
            row = jobs.get_job(session, None, job_id, lock=True)
            assert row is not None
            attempt, token = attempts.begin_attempt(session, row)
            jobs.set_state(session, row, "starting", "launched", allowed={"queued"})
            self.run_dir = Path(row.run_dir)
            self._path = f"/v1/link/{job_id}/{attempt.number}/events"
        store.close()
        self._url = service.url
        self._token = token
        self._seq = 0

    def say(self, kind: str, **data: Any) -> None:
        """One event, again and again until the service has it."""
        self._seq += 1
        one = {"time": time.time(), "attempt": 1, "seq": self._seq, "kind": kind, **data}
        end = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                reply = httpx.post(
                    self._url + self._path,
                    json={"first_seq": self._seq, "events": [one]},
                    headers={"Authorization": f"Bearer {self._token}"},
                    **PLAIN,
                )
                reply.raise_for_status()
                assert reply.json()["next_seq"] == self._seq + 1
                return
            except httpx.TransportError:
                assert time.monotonic() < end
                time.sleep(0.1)

    def run(self, steps: int) -> None:
        """A whole run."""
        self.say("transition", state="starting", run_dir=str(self.run_dir), changes=[])
        self.say("transition", state="running", attempt_seconds=1.0)
        for step in range(1, steps + 1):
            self.say("step", step=step, steps=steps, drops={}, metrics={"reward/mean": step / steps})
        self.say("transition", state="succeeded", reason="all steps were taken", result={"status": "succeeded"})


def test_events_come_once_and_in_order_while_the_service_is_killed_twice(
    service: ServerProcess, client: Client
) -> None:
    job = client.jobs.submit(SPEC, labels={"test": "events"})
    driver = Driver(service, job.id)
    driving = threading.Thread(target=driver.run, args=(40,))
    heard: list[int] = []

    def listen(event: api.Event) -> None:
        heard.append(event.id)
        if event.kind == "step" and event.data["step"] in (8, 23):
            service.kill()
            service.start()

    driving.start()
    ended = client.jobs.wait(job.id, 120.0, listen)
    driving.join(60)
    assert (ended.status.state, ended.status.step) == ("succeeded", 40)
    assert ended.status.result == {"status": "succeeded"}
    assert ended.status.summary.reward == 1.0
    stored = [event.id for event in client.jobs.events(job.id, follow=False)]
    assert heard == stored == list(range(1, len(stored) + 1))
    assert len(stored) >= 44
    assert [event.id for event in client.jobs.events(job.id, after=40)] == stored[40:]


def test_one_key_is_one_job(client: Client) -> None:
    first = client.jobs.submit(SPEC, idempotency_key="nightly-7")
    assert client.jobs.submit(SPEC, idempotency_key="nightly-7").id == first.id
    with pytest.raises(api.Invalid) as caught:
        client.jobs.submit(SPEC | {"seed": 1}, idempotency_key="nightly-7")
    assert caught.value.code == "key_reused"
    assert client.jobs.cancel(first.id).status.state == "cancelled"


def test_a_job_is_changed_steered_and_removed(client: Client) -> None:
    job = client.jobs.submit(SPEC, priority=60, labels={"team": "steered"})
    assert [one.id for one in client.jobs.list(label="team=steered")] == [job.id]
    changed = client.jobs.update(job.id, priority=70, if_match=job.generation)
    assert (changed.priority, changed.labels) == (70, {"team": "steered"})
    with pytest.raises(api.Conflict) as stale:
        client.jobs.update(job.id, priority=80, if_match=job.generation)
    assert stale.value.status == 412
    assert client.jobs.scale(job.id, 5).model_dump(exclude_none=True) == {"min": 1, "max": 5, "target": 5}
    assert client.jobs.scale(job.id).target == 5
    assert client.jobs.pause(job.id).status.state == "paused"
    assert client.jobs.wait(job.id, 30.0).status.state == "paused"
    assert client.jobs.resume(job.id).status.state == "queued"
    with pytest.raises(api.Conflict) as illegal:
        client.jobs.checkpoint(job.id)
    assert illegal.value.code == "illegal_transition"
    assert "queued" in str(illegal.value)
    with pytest.raises(api.Conflict):
        client.jobs.delete(job.id)
    client.jobs.cancel(job.id, discard=True)
    client.jobs.delete(job.id)
    with pytest.raises(api.NotFound):
        client.jobs.get(job.id)


def test_lists_of_many_pages_are_whole(client: Client) -> None:
    made = [client.jobs.submit(SPEC, labels={"many": "yes"}).id for _ in range(7)]
    found = [one.id for one in client.jobs.list(label="many=yes", page_size=3)]
    assert found == made[::-1]
    for one in made:
        client.jobs.cancel(one)
    assert list(client.jobs.list(label="many=yes", state="queued")) == []


def test_what_is_wrong_with_a_job_is_said_all_at_once(client: Client) -> None:
    with pytest.raises(api.Invalid) as caught:
        client.jobs.submit({"preset": "quickstart", "steps": 0, "rollout": {"worker": 2}})
    assert "steps must be >= 1, got 0" in str(caught.value)
    assert "did you mean rollout.workers?" in str(caught.value)
    checked = client.jobs.submit(SPEC, dry_run=True)
    assert (checked.valid, checked.spec["learner"]["ranks"]) == (True, 2)


def test_files_of_a_run_are_read_and_fetched(service: ServerProcess, client: Client, tmp_path: Path) -> None:
    job = client.jobs.submit(SPEC)
    driver = Driver(service, job.id)
    run_dir = driver.run_dir
    weights = os.urandom(3 << 20)
    for path, content in {
        "export/model.safetensors": weights,
        "export/sub/config.json": b"{}",
        "logs/rollout-0.log": "grüße\n".encode() * 100,
        "metrics.jsonl": b"".join(json.dumps({"step": n, "loss": 0.5, "x": n}).encode() + b"\n" for n in range(1, 6)),
        "samples.jsonl": b'{"step": 1, "prompt": "a"}\n{"step": 2, "prompt": "b\xe2\x80\xa8"}\n',
    }.items():
        (run_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / path).write_bytes(content)
    driver.run(1)

    part = tmp_path / "model" / "model.safetensors.part"
    part.parent.mkdir()
    part.write_bytes(weights[: 1 << 20])
    client.jobs.download_export(job.id, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "model" / "sub" / "config.json").read_bytes() == b"{}"
    assert not part.exists()

    assert {row["name"] for row in client.jobs.logs(job.id)} == {"rollout-0.log", "driver-1"}
    first = client.jobs.log(job.id, "rollout-0.log", limit=100)
    rest = client.jobs.log(job.id, "rollout-0.log", first.next_offset)
    assert (first.data + rest.data).decode() == "grüße\n" * 100
    assert client.jobs.log(job.id, "rollout-0.log", -8).data.decode() == "grüße\n"
    assert client.jobs.metrics(job.id, from_step=4, names=["loss"]) == [{"step": n, "loss": 0.5} for n in (4, 5)]
    assert [row["prompt"] for row in client.jobs.samples(job.id, step=2)] == ["b\u2028"]
    assert client.jobs.config(job.id)["steps"] == 40
    assert client.jobs.checkpoints(job.id) == []
    assert client.jobs.workers(job.id) == []
    with pytest.raises(api.NotFound):
        client.jobs.log(job.id, "../spec.json")


def test_data_is_uploaded_checked_and_used(client: Client, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text('{"question": "1+1=", "answer": "2"}\n' * 3)
    made = client.datasets.upload(data)
    assert (made.rows, made.columns, made.name) == (3, ["question", "answer"], "sums.jsonl")
    assert client.datasets.get(made.id) == made
    assert made.id in {one.id for one in client.datasets.list()}
    job = client.jobs.submit(SPEC | {"data": {"train": [{"path": f"dataset:{made.id}"}]}})
    with pytest.raises(api.Conflict):
        client.datasets.delete(made.id)
    client.jobs.cancel(job.id)
    client.datasets.delete(made.id)
    data.write_text('{"question": "1+1="}\nnot json\n')
    with pytest.raises(api.Invalid, match="line 2"):
        client.datasets.upload(data)
    assert [row["path"] for row in client.models.list()] == ["builtin:*"]


def test_keys_open_what_they_are_for_and_nothing_else(service: ServerProcess, client: Client) -> None:
    job = client.jobs.submit(SPEC)
    url = client.base_url
    reader = client.keys.create("reader", scopes=["read"], expires_at=datetime.now(UTC) + timedelta(days=1))
    other = client.keys.create("other", tenant="elsewhere")
    with Client(url, reader.secret) as one:
        assert one.jobs.get(job.id).id == job.id
        with pytest.raises(api.Forbidden, match="submit"):
            one.jobs.submit(SPEC)
    with Client(url, other.secret) as one:
        with pytest.raises(api.NotFound):
            one.jobs.get(job.id)
        with pytest.raises(api.NotFound):
            next(one.jobs.events(job.id))
        assert list(one.jobs.list()) == []
    client.keys.revoke(other.id)
    with Client(url, other.secret) as one, pytest.raises(api.Unauthorized):
        one.jobs.list().__next__()
    assert {key.id for key in client.keys.list()} >= {reader.id, other.id}
    client.jobs.cancel(job.id)
