"""A service of real sockets whose answers a test writes down beforehand; 599 is what was not written down."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

STARTS_WITHIN_S = 20.0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What goes out: a status, headers, chunks; `drop` breaks the connection after the last chunk, in mid-answer."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    drop: bool = False
    pause_s: float = 0.0
    """Before each chunk."""


Script = Answer | Callable[[Request], Answer]


def reply(data: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, {"content-type": "application/json", **headers}, [json.dumps(data).encode()])


def problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    body = {"type": f"/problems/{code}", "title": code, "status": status, "code": code, "detail": detail, **fields}
    known = {"content-type": "application/problem+json", **(headers or {})}
    return Answer(status, known, [json.dumps(body).encode()])


def stream(*chunks: str | bytes, drop: bool = False, pause_s: float = 0.0) -> Answer:
    """Server-sent events, chunk by chunk as they go over the wire."""
    raw = [chunk.encode() if isinstance(chunk, str) else chunk for chunk in chunks]
    return Answer(200, {"content-type": "text/event-stream"}, raw, drop, pause_s)


def event(number: int, kind: str = "step", **data: Any) -> dict[str, Any]:
    source = {"id": number, "time": "2026-01-01T00:00:00Z", "source": "driver", "attempt": 1}
    return source | {"kind": kind, "data": data}


def sse(one: dict[str, Any]) -> str:
    return f"id: {one['id']}\r\nevent: {one['kind']}\r\ndata: {json.dumps(one)}\r\n\r\n"


JOB_ID = "job-2222222222222222222a"


def job(state: str = "running", **changed: Any) -> dict[str, Any]:
    """A job as the service shows it; `changed` are keys of its status."""
    now = "2026-01-01T00:00:00Z"
    scale = {"min": 1, "max": 4, "target": 2}
    status = {"state": state, "reason": "as it is", "since": now, "attempt": 1, "step": 1, "steps": 2, "restarts": 0}
    status |= {"summary": {}, "conditions": [], "result": None}
    top = {"id": JOB_ID, "name": "quickstart", "tenant": "default", "priority": 50, "labels": {}, "generation": 3}
    top |= {"created_at": now, "updated_at": now, "spec": {"steps": 2}}
    return top | {"desired": {"state": "run", "scale": scale}, "status": status | changed}


class Service:
    """Answers for each `METHOD path`, in the order they were written down; the last one stays."""

    def __init__(self) -> None:
        self._scripts: dict[str, deque[Script]] = defaultdict(deque)
        self.requests: list[Request] = []
        self.url = ""

    def on(self, where: str, *answers: Script) -> None:
        self._scripts[where].clear()
        self._scripts[where].extend(answers)

    def asked(self, where: str) -> list[Request]:
        return [one for one in self.requests if f"{one.method} {one.path}" == where]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        raw_path = scope["raw_path"].decode().partition("?")[0]
        request = Request(scope["method"], raw_path, scope["query_string"].decode(), headers, body)
        self.requests.append(request)
        await self._answer(request, send)

    async def _answer(self, request: Request, send: Any) -> None:
        import asyncio

        scripts = self._scripts[f"{request.method} {request.path}"]
        if not scripts:
            answer = problem(599, "not_written_down", f"{request.method} {request.path}")
        else:
            script = scripts[0] if len(scripts) == 1 else scripts.popleft()
            answer = script if isinstance(script, Answer) else script(request)
        length = {} if answer.drop or answer.pause_s else {"content-length": str(sum(map(len, answer.chunks)))}
        if answer.drop and "content-length" in answer.headers:
            length = {}
        raw = [(name.encode(), value.encode()) for name, value in {**length, **answer.headers}.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        for chunk in answer.chunks:
            await asyncio.sleep(answer.pause_s)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if answer.drop:
            raise ConnectionAbortedError("as the test wants it")  # uvicorn closes the socket in mid-answer
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextmanager
def serving(service: Service) -> Iterator[Service]:
    """Run it in a thread until the end of the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(service, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        end = time.monotonic() + STARTS_WITHIN_S
        while not server.started:
            assert time.monotonic() < end, "the test's own service did not start"
            time.sleep(0.01)
        try:
            yield service
        finally:
            server.should_exit = True
            thread.join(timeout=STARTS_WITHIN_S)
            assert not thread.is_alive()
