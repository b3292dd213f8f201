"""Events over the API: by pages, and as streams of a real server process that is killed, and loses its database."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_parts import Connect, brought_to, deliver, problem, started, submitted
from api_server import ADMIN_KEY, PLAIN, ServerProcess
from starlette.testclient import TestClient

from sapo_ray.control.store import Store, events, jobs, keys

STREAM = {"Accept": "text/event-stream"}


def append(store: Store, job_id: str, number: int) -> None:
    """So many further events of the job."""
    with store.begin() as session:
        row = jobs.get_job(session, None, job_id, lock=True)
        assert row is not None
        for _ in range(number):
            events.append_control_event(session, row, "note", text="line\nbreak")


class Reader(threading.Thread):
    """Reads one stream as a client does: reconnects with Last-Event-ID until it is told that all was sent."""

    def __init__(self, url: str, job_id: str, seconds: float = 90.0) -> None:
        super().__init__(daemon=True)
        self.ids: list[int] = []
        self.comments: list[str] = []
        self.statuses: list[int] = []
        self.ended = False
        self._url, self._job_id, self._until = url, job_id, time.monotonic() + seconds

    def run(self) -> None:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}", **STREAM}
        with httpx.Client(base_url=self._url, headers=headers, timeout=20, **PLAIN) as http:
            while not self.ended and time.monotonic() < self._until:
                try:
                    self._once(http)
                except httpx.TransportError:
                    time.sleep(0.05)

    def _once(self, http: httpx.Client) -> None:
        since = {"Last-Event-ID": str(self.ids[-1])} if self.ids else {}
        with http.stream("GET", f"/v1/jobs/{self._job_id}/events", headers=since) as answer:
            self.statuses.append(answer.status_code)
            self.ended = answer.status_code == 204
            if answer.status_code >= 400:
                time.sleep(0.05)
                return
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    self.ids.append(int(line[4:]))
                elif line.startswith("data: "):
                    assert json.loads(line[6:])["id"] == self.ids[-1]
                elif line.startswith(":"):
                    self.comments.append(line)
            self.ended = self.ended or bool(answer.status_code == 200 and self._has_ended(http))

    def _has_ended(self, http: httpx.Client) -> bool:
        state = http.get(f"/v1/jobs/{self._job_id}", headers={"Accept": "application/json"}).json()["status"]["state"]
        return state in ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its database."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    environment = {
        "SAPO_WATCH_INTERVAL_S": "0.05",
        "SAPO_STREAM_HEARTBEAT_S": "0.3",
        "SAPO_MAX_STREAMS_PER_TENANT": "60",
    }
    with ServerProcess(folder, f"sqlite:///{folder / 'control.db'}", **environment) as server:
        yield server


@pytest.fixture(scope="module")
def behind(server: ServerProcess, folder: Path) -> Iterator[Store]:
    """The server's store, from beside it."""
    store = Store(f"sqlite:///{folder / 'control.db'}")
    yield store
    store.close()


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=20, **PLAIN) as client:
        yield client


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def new_job(http: httpx.Client) -> str:
    return str(http.post("/v1/jobs", json={"spec": {"preset": "quickstart"}}).json()["id"])


def test_pages_hold_all_events_in_order_and_can_be_of_one_kind(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    append(store, job_id, 5)
    path = f"/v1/jobs/{job_id}/events"
    page = acme.get(f"{path}?limit=4").json()
    assert ([event["id"] for event in page["data"]], page["has_more"], page["next"]) == ([1, 2, 3, 4], True, "4")
    rest = acme.get(f"{path}?after={page['next']}").json()
    assert ([event["id"] for event in rest["data"]], rest["has_more"], rest["next"]) == ([5, 6], False, None)
    assert [event["id"] for event in acme.get(f"{path}?kind=transition").json()["data"]] == [1]
    assert acme.get(f"{path}?after=99").json()["data"] == []


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "7", "99999999999999999999", "٣"])
def test_a_last_event_id_that_the_job_never_had_is_400(acme: TestClient, given: str) -> None:
    job_id = submitted(acme)
    answer = acme.get(f"/v1/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": given.encode()})
    assert problem(answer, 400, "bad_cursor")["param"] == "Last-Event-ID"


def test_a_stream_of_a_job_that_has_ended_holds_everything_and_ends(acme: TestClient, store: Store) -> None:
    job_id = submitted(acme)
    append(store, job_id, 1200)
    brought_to(store, job_id, "failed")
    answer = acme.get(f"/v1/jobs/{job_id}/events", headers=STREAM)
    assert answer.headers["content-type"].startswith("text/event-stream")
    ids = [int(line[4:]) for line in answer.text.split("\n") if line.startswith("id: ")]
    assert ids == list(range(1, 1203))
    data = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
    assert (data[1]["data"]["text"], data[-1]["data"]["state"]) == ("line\nbreak", "failed")
    resumed = acme.get(f"/v1/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "1200"})
    assert [line for line in resumed.text.split("\n") if line.startswith("id: ")] == ["id: 1201", "id: 1202"]
    assert acme.get(f"/v1/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "1202"}).status_code == 204


def test_a_failure_that_is_recovered_from_does_not_end_the_stream(
    http: httpx.Client, server: ServerProcess, behind: Store
) -> None:
    job_id = new_job(http)
    token = started(behind, job_id)
    reader = Reader(server.url, job_id)
    reader.start()
    send: Any = http
    deliver(
        send,
        job_id,
        token,
        1,
        {"kind": "transition", "state": "running"},
        {"kind": "transition", "state": "interrupted"},
    )
    until(lambda: len(reader.ids) >= 5)
    brought_to(behind, job_id, "starting")
    brought_to(behind, job_id, "succeeded")
    reader.join(30)
    newest = http.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"][-1]["id"]
    assert reader.ids == list(range(1, newest + 1))
    assert reader.statuses[0] == 200
    assert len(reader.statuses) == 1


def test_a_quiet_stream_shows_that_it_lives(http: httpx.Client, server: ServerProcess, behind: Store) -> None:
    job_id = new_job(http)
    reader = Reader(server.url, job_id)
    reader.start()
    until(lambda: len(reader.comments) >= 3)
    brought_to(behind, job_id, "failed")
    reader.join(30)
    assert reader.ids == [1, 2]


def test_fifty_streams_see_every_event_once_through_a_kill_of_the_service(
    http: httpx.Client, server: ServerProcess, behind: Store
) -> None:
    ours, other = new_job(http), new_job(http)
    readers = [Reader(server.url, ours) for _ in range(40)] + [Reader(server.url, other) for _ in range(10)]
    for reader in readers:
        reader.start()
    for round in range(12):
        for job_id in (ours, other):
            append(behind, job_id, 5)
        if round == 6:
            server.kill()
            append(behind, other, 520)  # more than the service reads at once
            server.start()
        time.sleep(0.05)
    for job_id in (ours, other):
        brought_to(behind, job_id, "succeeded")
    for reader in readers:
        reader.join(90)
    with behind.read() as session:
        newest = events.newest_ids(session, [ours, other])
    assert newest == {ours: 62, other: 582}
    for reader, job_id in zip(readers, [ours] * 40 + [other] * 10, strict=True):
        assert reader.ids == list(range(1, newest[job_id] + 1))


def test_a_stream_survives_the_loss_of_the_database(
    http: httpx.Client, server: ServerProcess, behind: Store, folder: Path
) -> None:
    job_id = new_job(http)
    reader = Reader(server.url, job_id)
    reader.start()
    until(lambda: reader.ids)
    (folder / "control.db").rename(folder / "away.db")
    until(lambda: http.get("/v1/jobs").status_code == 503)
    time.sleep(1.0)
    (folder / "away.db").rename(folder / "control.db")
    append(behind, job_id, 3)
    brought_to(behind, job_id, "failed")
    reader.join(60)
    assert reader.ids == [1, 2, 3, 4, 5]
    assert reader.statuses == [200]


def test_more_streams_than_a_tenant_may_have_are_429_and_those_that_close_make_room(
    http: httpx.Client, server: ServerProcess, behind: Store
) -> None:
    job_id = new_job(http)
    readers = [Reader(server.url, job_id) for _ in range(60)]
    for reader in readers:
        reader.start()
    until(lambda: all(reader.ids for reader in readers))
    refused = http.get(f"/v1/jobs/{job_id}/events", headers=STREAM)
    problem(refused, 429, "rate_limited")
    assert int(refused.headers["Retry-After"]) >= 1
    assert http.get("/v1/jobs").status_code == 200
    brought_to(behind, job_id, "failed")
    for reader in readers:
        reader.join(60)
    again = new_job(http)
    until(lambda: _opens(http, again))


def _opens(http: httpx.Client, job_id: str) -> bool:
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
        return answer.status_code == 200


def test_all_streams_cost_one_look_at_the_store(
    connect: Connect, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapo_ray.control import watch

    looks: list[int] = []
    original = events.newest_ids

    def counted(session: Any, ids: list[str]) -> dict[str, int]:
        looks.append(len(set(ids)))
        return original(session, ids)

    monkeypatch.setattr(watch.events, "newest_ids", counted)
    client = connect(watch_interval_s=0.2)
    ours = [submitted(client) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        streams = [pool.submit(client.get, f"/v1/jobs/{one}/events", headers=STREAM) for one in ours]
        until(lambda: 20 in looks)
        before = len(looks)
        began = time.monotonic()
        time.sleep(1.5)
        ticks = (time.monotonic() - began) / 0.2
        assert len(looks) - before <= ticks + 1
        for one in ours:
            brought_to(store, one, "failed")
        for stream in streams:
            assert stream.result(30).text.count("\nid: ") + stream.result(30).text.startswith("id: ") == 2
    until(lambda: client.app.state.control.watcher.open_streams == 0)  # type: ignore[attr-defined]


def test_a_stream_ends_when_its_job_is_deleted(connect: Connect, store: Store) -> None:
    client = connect(watch_interval_s=0.2)
    ours = submitted(client)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(client.get, f"/v1/jobs/{ours}/events", headers=STREAM)
        until(lambda: client.app.state.control.watcher.open_streams == 1)  # type: ignore[attr-defined]
        with store.begin() as session:  # cancelled and deleted between two looks of the watcher
            row = jobs.get_job(session, None, ours, lock=True)
            assert row is not None
            jobs.set_state(session, row, "cancelled", "by the test", allowed={"queued"})
            jobs.delete_job(session, row)
        assert stream.result(30).status_code == 200
    until(lambda: client.app.state.control.watcher.open_streams == 0)  # type: ignore[attr-defined]


def test_what_a_driver_delivers_is_on_the_streams_before_the_next_tick(connect: Connect, store: Store) -> None:
    client = connect(watch_interval_s=600.0)
    ours = submitted(client)
    token = started(store, ours)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(client.get, f"/v1/jobs/{ours}/events", headers=STREAM)
        until(lambda: client.app.state.control.watcher.open_streams == 1)  # type: ignore[attr-defined]
        for first, state in ((1, "running"), (2, "succeeded")):
            assert deliver(client, ours, token, first, {"kind": "transition", "state": state}).status_code == 200
        assert '"state":"succeeded"' in stream.result(30).text


def watched_until_cut_off(server: ServerProcess, job_id: str, secret: str, cut: Callable[[], object]) -> float:
    """Seconds from `cut`, done once the stream has begun, to the stream's end."""
    headers = {"Authorization": f"Bearer {secret}", **STREAM}
    url = f"{server.url}/v1/jobs/{job_id}/events"
    with httpx.stream("GET", url, headers=headers, timeout=20, **PLAIN) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        while not next(lines).startswith("data: "):
            pass
        cut()
        began = time.monotonic()
        for line in lines:  # of the heartbeats, too, there is an end
            assert time.monotonic() - began < 30, line
    answer = httpx.get(url, headers=headers, timeout=20, **PLAIN)
    assert answer.status_code == 401
    return time.monotonic() - began


def test_a_stream_ends_with_its_key_whoever_revoked_it_and_when_it_expires(
    server: ServerProcess, behind: Store, http: httpx.Client
) -> None:
    job_id = new_job(http)

    def made(**more: Any) -> tuple[str, str]:
        answer = http.post("/v1/api-keys", json={"name": "a watcher's", "scopes": ["read"], **more}).json()
        return answer["id"], answer["secret"]

    def revoked_elsewhere() -> None:
        with behind.begin() as session:
            row = keys.get_key(session, None, key_id)
            assert row is not None
            keys.revoke(session, row)

    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as others:
        lines = others.iter_lines()
        key_id, secret = made()
        watched_until_cut_off(server, job_id, secret, lambda: http.delete(f"/v1/api-keys/{key_id}"))
        key_id, secret = made()
        watched_until_cut_off(server, job_id, secret, revoked_elsewhere)
        soon = datetime.now(UTC) + timedelta(seconds=3)
        _, secret = made(expires_at=soon.isoformat())
        watched_until_cut_off(server, job_id, secret, lambda: None)
        ended = time.monotonic()
        while time.monotonic() < ended + 1:
            next(lines)  # what came meanwhile, and then heartbeats: another's key goes on
