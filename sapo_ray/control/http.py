"""How HTTP is spoken: bounds on what a connection may hold and for how long, before any request is there to refuse."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_HEAD_BYTES = 64 << 10
"""Request line and headers."""
HEAD_S = 30.0
"""A head that is not whole by then does not come."""
MOST_CONNECTIONS = 2000
"""Event streams among them; who comes beyond them is answered 503."""


class Protocol(H11Protocol):
    """Closes connections on which a head was begun, or nothing at all was sent, for HEAD_S."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is awaited."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """A head is whole, or goes on to be awaited."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._late is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited."""
        self._stop()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def configured(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """A server's configuration; h11 is the one of uvicorn's parsers that bounds heads."""
    return uvicorn.Config(
        app,
        http=Protocol,
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        limit_concurrency=MOST_CONNECTIONS,
        log_config=None,
        access_log=False,
        **more,
    )
