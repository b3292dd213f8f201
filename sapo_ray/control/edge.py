"""The outermost layer of the service: request ids, body limits, the line per request, and the last catch."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable

import structlog
from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sapo_ray.control.problems import Refused, respond, unforeseen

log = structlog.get_logger("sapo_ray.control.requests")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
BODY_S = 30.0
"""Longest wait for the next part of a body."""
GONE = 499
"""Counted for a client that hung up before its request was whole; nobody is there to be sent it."""
Observer = Callable[[str, str, int, float], None]
"""Told of every answer: method, route, status, seconds to its end."""


class Edge:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, *, limit_of: Callable[[str, str], int], observe: Observer) -> None:
        self._app = app
        self._limit_of = limit_of
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(10)}"
        scope["sapo_request_id"] = request_id
        scope.setdefault("state", {})
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        await _Exchange(scope, receive, send, request_id, self._limit_of(scope["method"], scope["path"])).run(
            self._app, headers, self._observe
        )


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str, limit: int) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._id = request_id
        self._limit = limit
        self._received = 0
        self._whole = False
        self._status = 0
        self._began = time.perf_counter()

    async def run(self, app: ASGIApp, headers: Headers, observe: Observer) -> None:
        try:
            announced = headers.get("content-length", "")
            if announced.isdigit() and int(announced) > self._limit:
                raise self._too_large()
            await app(self._scope, self.receive, self.send)
        except ClientDisconnect:
            self._status = GONE
            log.debug("client_gone", received=self._received)
        except Exception as error:
            request = Request(self._scope)
            if self._status:
                log.error("unhandled", error=type(error).__name__, exc_info=error)
                raise  # an answer has begun: the server must break the connection
            answer = respond(request, error) if isinstance(error, Refused) else unforeseen(request, error)
            await answer(self._scope, self._receive, self.send)
        finally:
            self._finish(observe)

    async def receive(self) -> Message:
        """As the server's, counting: what is too long is refused while it comes, not after."""
        try:
            async with asyncio.timeout(None if self._whole else BODY_S):
                message = await self._receive()
        except TimeoutError:
            raise Refused(
                408,
                "stalled",
                f"nothing more of the body came for {BODY_S:g} s; {self._received} bytes had",
                hint="send the request again",
                headers={"Connection": "close"},
            ) from None
        self._whole = not message.get("more_body", False)
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self._limit:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._id
            headers.setdefault("X-Content-Type-Options", "nosniff")
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)

    def _too_large(self) -> Refused:
        return Refused(
            413,
            "too_large",
            f"the body is larger than the {self._limit} bytes that this address takes",
            hint="send less; data goes to /v1/datasets as a file",
            headers={"Connection": "close"},
            limit=self._limit,
        )

    def _finish(self, observe: Observer) -> None:
        route = getattr(self._scope.get("route"), "path_format", "unmatched")
        seconds = time.perf_counter() - self._began
        observe(self._scope["method"], route, self._status, seconds)
        caller = self._scope["state"].get("caller")
        quiet = route in ("/healthz", "/readyz", "/metrics") or route.startswith("/v1/link/")
        (log.debug if quiet and self._status < 400 else log.info)(
            "request",
            method=self._scope["method"],
            route=route,
            path=self._scope["path"],
            status=self._status,
            ms=round(1000 * seconds, 1),
            tenant=getattr(caller, "tenant", None),
            key=getattr(caller, "key_id", None),
            job_id=self._scope.get("path_params", {}).get("job_id"),
        )
