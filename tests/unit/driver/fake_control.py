"""A control plane that keeps the link's protocol to the letter, and can be made to fail in every way it allows."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

TOKEN = "token-1"


def orders(**changes: Any) -> dict[str, Any]:
    first = {"state": "run", "discard": False, "rollout_workers": 1, "checkpoint_request": 0, "generation": 1}
    return first | changes


@dataclass
class FakeControl:
    """Serves on a port of its own; `stop` and `start` are its death and its return with all it had stored."""

    orders: dict[str, Any] = field(default_factory=orders)
    assignment: dict[str, Any] = field(default_factory=dict)
    faults: deque[str] = field(default_factory=deque)
    """What befalls next calls: 503, 429, proxy, login or gateway (its 401), refused (ours), lost, late, nonsense."""
    stored: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """By attempt; exactly what a store would hold."""
    newest: int = 1
    """Attempt that is not superseded."""
    largest: int = 1 << 20
    """Bytes of a body."""
    accepts: Callable[[dict[str, Any]], bool] = lambda event: True
    """A batch with an event that it does not accept is refused whole."""
    more: dict[str, Any] = field(default_factory=dict)
    """Fields of answers that drivers do not know yet."""
    on_event: Callable[[dict[str, Any]], None] | None = None
    calls: int = 0
    heartbeats: int = 0
    batches: list[int] = field(default_factory=list)
    port: int = 0

    def start(self) -> FakeControl:
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        app = FastAPI()
        app.post("/v1/link/{job}/{attempt}/events")(self._events)
        app.get("/v1/link/{job}/{attempt}/assignment")(self._assignment)
        config = uvicorn.Config(app, port=self.port, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < end
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def events(self, attempt: int = 1) -> list[dict[str, Any]]:
        return list(self.stored.get(attempt, []))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s; stored: {self.stored}"
            time.sleep(0.005)

    async def _assignment(self, job: str, attempt: int, request: Request) -> Any:
        self.calls += 1
        if (answer := self._refusal(attempt, request)) is not None:
            return answer
        return (
            {"job_id": job, "attempt": attempt, "secrets": {}, "orders": self.orders | self.more}
            | self.assignment
            | self.more
        )

    async def _events(self, job: str, attempt: int, request: Request) -> Any:
        self.calls += 1
        fault = self.faults[0] if self.faults else ""
        if (answer := self._refusal(attempt, request)) is not None:
            return answer
        raw = await request.body()
        if len(raw) > self.largest:
            return problem(413, "body_too_large")
        body = await request.json()
        stored = self.stored.setdefault(attempt, [])
        first, events = body["first_seq"], body["events"]
        assert [event["seq"] for event in events] == list(range(first, first + len(events)))
        assert {event["attempt"] for event in events} <= {attempt}
        if first > len(stored) + 1:
            return problem(409, "sequence_gap", expected=len(stored) + 1)
        if not all(self.accepts(event) for event in events):
            return problem(422, "invalid_request", errors=[{"param": "events[0].step", "detail": "of another shape"}])
        self.heartbeats += not events
        self.batches.append(len(events))
        for event in events[len(stored) + 1 - first :]:
            stored.append(event)
            if self.on_event is not None:
                self.on_event(event)
        if fault == "lost":
            return HTMLResponse("<h1>502</h1>", 502)
        if fault == "late":
            await asyncio.sleep(1.0)
        return {"next_seq": len(stored) + 1, "orders": self.orders | self.more} | self.more

    def _refusal(self, attempt: int, request: Request) -> Any:
        fault = self.faults.popleft() if self.faults else ""
        if request.headers.get("authorization") != f"Bearer {TOKEN}" or fault == "refused":
            return problem(401, "unauthenticated")
        if attempt < self.newest:
            return problem(409, "superseded")
        if fault in ("503", "429"):
            return JSONResponse({"code": "unavailable"}, int(fault), {"Retry-After": "0"})
        if fault == "proxy":
            return HTMLResponse("<h1>not found</h1>", 404)
        if fault == "login":
            return HTMLResponse("<h1>please log in</h1>", 401)
        if fault == "gateway":
            return JSONResponse({"code": 401, "message": "no session"}, 401)
        if fault == "nonsense":
            return HTMLResponse("<h1>welcome</h1>", 200)
        return None


def problem(status: int, code: str, **more: Any) -> JSONResponse:
    body = {"type": f"/problems/{code}", "title": code, "status": status, "code": code, "detail": code} | more
    return JSONResponse(body, status, media_type="application/problem+json")
