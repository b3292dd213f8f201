"""The load generator of control.py, a process of its own: one JSON command a line in, one JSON answer a line out.

It speaks HTTP/1.1 by hand on connections that stay open, because a client library would need more processor time for a
request than the bare route that it is to measure.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Self

STEP_METRICS = {f"measure_{n // 10}/metric_{n}": 0.123456789 * n for n in range(75)}
"""As many as a step's event has; about 2.5 kB."""
ARRIVAL_S = 30.0


class Connection:
    """One connection that stays open; one request at a time."""

    def __init__(self, port: int, key: str = "") -> None:
        self._port = port
        self._key = key

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[bytes, bytes]]:
        """Send a request and read the answer's head."""
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        lines += [f"Authorization: Bearer {self._key}"] if self._key else []
        lines += ["Content-Type: application/json"] if body else []
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        first, *rest = head[:-4].split(b"\r\n")
        return int(first.split(b" ", 2)[1]), {
            name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in rest)
        }

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        """A request's answer; anything but success ends the benchmark."""
        status, answered = await self.send(method, path, body, **headers)
        content = await self._reader.readexactly(int(answered[b"content-length"]))
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status} {content[:500]!r}")
        return content

    async def line(self) -> bytes:
        """The next line of a stream; empty at its end."""
        return await self._reader.readline()


async def together(count: int, seconds: float, one: Callable[[int, float], Awaitable[list[float]]]) -> dict[str, Any]:
    """Run `one(number, end)` `count` times at once until `end`; each gives its requests' seconds."""
    cpu, began = time.process_time(), time.perf_counter()
    parts = await asyncio.gather(*(one(number, began + seconds) for number in range(count)))
    took = time.perf_counter() - began
    return {
        "times": [second for part in parts for second in part],
        "seconds": took,
        "load_cpu": (time.process_time() - cpu) / took,
    }


async def requests(port: int, key: str, kind: str, paths: list[str], at_once: int, seconds: float) -> dict[str, Any]:
    """GET `paths` in turn, or submit a job to the first of them, each time with a new idempotency key."""
    job = b'{"spec": {"preset": "quickstart"}}'

    async def one(number: int, end: float) -> list[float]:
        times = []
        async with Connection(port, key) as connection:
            while (began := time.perf_counter()) < end:
                if kind == "GET":
                    await connection.ask("GET", paths[(number + len(times)) % len(paths)])
                else:
                    await connection.ask("POST", paths[0], job, Idempotency_Key=uuid.uuid4().hex)
                times.append(time.perf_counter() - began)
        return times

    return await together(at_once, seconds, one)


async def walk(port: int, key: str, limit: int) -> dict[str, Any]:
    """All jobs, page by page. Gives the pages' seconds, and how many different jobs were seen."""
    times, seen, after = [], set(), ""
    cpu, start = time.process_time(), time.perf_counter()
    async with Connection(port, key) as connection:
        while True:
            began = time.perf_counter()
            content = await connection.ask("GET", f"/v1/jobs?limit={limit}{after}")
            times.append(time.perf_counter() - began)
            page = json.loads(content)
            seen.update(job["id"] for job in page["data"])
            if not page["has_more"]:
                took = time.perf_counter() - start
                return {
                    "times": times,
                    "jobs": len(seen),
                    "seconds": took,
                    "load_cpu": (time.process_time() - cpu) / took,
                }
            after = f"&after={page['next']}"


class Driver:
    """One attempt of one job, which delivers events over a connection that stays open."""

    def __init__(self, port: int, job: dict[str, Any]) -> None:
        self._path = f"/v1/link/{job['id']}/1/events"
        self._connection = Connection(port, job["token"])
        self.next = 1

    async def __aenter__(self) -> Self:
        await self._connection.__aenter__()
        self.next = json.loads(await self._connection.ask("POST", self._path, b'{"first_seq": 1, "events": []}'))[
            "next_seq"
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.__aexit__()

    async def deliver(self, count: int) -> float:
        """Deliver so many events, one in five of them a step. Gives the seconds from sending to the answer."""
        events = []
        for seq in range(self.next, self.next + count):
            frame = {"time": time.time(), "attempt": 1, "seq": seq, "n": seq}
            if seq % 5 == 0:
                events.append(
                    {**frame, "kind": "step", "step": seq // 5, "steps": 10**9, "drops": {}, "metrics": STEP_METRICS}
                )
            else:
                events.append({**frame, "kind": "phase", "phase": "training", "step": seq // 5})
        body = json.dumps({"first_seq": self.next, "events": events}).encode()
        began = time.perf_counter()
        answer = json.loads(await self._connection.ask("POST", self._path, body))
        took = time.perf_counter() - began
        self.next += count
        if answer["next_seq"] != self.next:
            raise RuntimeError(f"{answer['next_seq']} is next, not {self.next}")
        return took


async def ingest(port: int, jobs: list[dict[str, Any]], batch: int, seconds: float) -> dict[str, Any]:
    """Each job's driver delivers batch after batch, all at once."""

    async def one(number: int, end: float) -> list[float]:
        times = []
        async with Driver(port, jobs[number]) as driver:
            while time.perf_counter() < end:
                times.append(await driver.deliver(batch))
        return times

    return await together(len(jobs), seconds, one)


class Streams:
    """Event streams that stay open from one command to the next."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: list[asyncio.Event] = []
        self._arrived: dict[int, dict[int, float]] = {}
        """By stream: an event's sequence number and when it came."""
        self._ids: dict[int, list[int]] = {}

    async def open(self, port: int, key: str, jobs: list[dict[str, Any]], count: int) -> dict[str, Any]:
        """Follow the jobs, each with as many streams as the others, from their newest event on."""
        cpu, began = time.process_time(), time.perf_counter()
        for number in range(count):
            self._ready.append(asyncio.Event())
            self._arrived[number], self._ids[number] = {}, []
            job = jobs[number % len(jobs)]
            self._tasks.append(asyncio.create_task(self._follow(number, port, key, job["id"], job["newest"])))
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in self._ready)), ARRIVAL_S)
        took = time.perf_counter() - began
        return {"seconds": took, "load_cpu": (time.process_time() - cpu) / took}

    async def _follow(self, number: int, port: int, key: str, job_id: str, newest: int) -> None:
        async with Connection(port, key) as connection:
            path = f"/v1/jobs/{job_id}/events"
            status, _ = await connection.send("GET", path, Accept="text/event-stream", Last_Event_ID=str(newest))
            if status != 200:
                raise RuntimeError(f"{path}: {status}")
            while line := await connection.line():
                if line.startswith(b":"):
                    self._ready[number].set()
                elif line.startswith(b"data: "):
                    now = time.perf_counter()
                    event = json.loads(line[6:])
                    self._ids[number].append(event["id"])
                    self._arrived[number][event["data"]["n"]] = now

    async def watch(
        self, port: int, jobs: list[dict[str, Any]], batch: int, every_s: float, seconds: float
    ) -> dict[str, Any]:
        """Drivers deliver a batch every so many seconds. Gives how long after the answer each event came on each
        stream, and whether all streams had every event in order, once."""
        answered: list[dict[int, float]] = [{} for _ in jobs]

        async def one(number: int, end: float) -> list[float]:
            times = []
            async with Driver(port, jobs[number]) as driver:
                await asyncio.sleep(every_s * number / len(jobs))
                while (began := time.perf_counter()) < end:
                    first = driver.next
                    times.append(await driver.deliver(batch))
                    now = time.perf_counter()
                    answered[number] |= dict.fromkeys(range(first, driver.next), now)
                    await asyncio.sleep(max(0.0, began + every_s - now))
            return times

        result = await together(len(jobs), seconds, one)
        deadline = time.perf_counter() + ARRIVAL_S
        while any(len(self._arrived[n]) < len(answered[n % len(jobs)]) for n in self._arrived):
            if time.perf_counter() > deadline:
                raise TimeoutError("events did not arrive")
            await asyncio.sleep(0.01)
        delays, gap_free = [], True
        for number, arrived in self._arrived.items():
            job, sent = jobs[number % len(jobs)], answered[number % len(jobs)]
            ids = self._ids[number]
            gap_free &= ids == list(range(job["newest"] + 1, job["newest"] + 1 + len(ids))) and list(arrived) == list(
                sent
            )
            delays += [arrived[seq] - sent[seq] for seq in sent]
        return result | {"delays": delays, "gap_free": gap_free}

    async def close(self) -> dict[str, Any]:
        """End all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.__init__()  # type: ignore[misc]
        return {}


async def idle(seconds: float) -> dict[str, Any]:
    """Do nothing but keep open what is open."""
    await asyncio.sleep(seconds)
    return {"seconds": seconds}


async def main() -> None:
    streams = Streams()
    commands: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
        "requests": requests,
        "walk": walk,
        "ingest": ingest,
        "idle": idle,
        "open": streams.open,
        "watch": streams.watch,
        "close": streams.close,
    }
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        print(json.dumps(await commands[command.pop("do")](**command)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
