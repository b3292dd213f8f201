"""Answers of other services over HTTP: read up to a bound, and told without passwords."""

from __future__ import annotations

import httpx

from sapo_ray.errors import SapoRayError


class TooLarge(SapoRayError):
    """An answer has more bytes than are read."""


def read(coming: httpx.Response, most: int) -> httpx.Response:
    """The whole answer. Raises TooLarge for one of more than `most` bytes, before it fills the memory."""
    parts: list[bytes] = []
    size = 0
    for part in coming.iter_bytes():
        size += len(part)
        if size > most:
            raise TooLarge(f"{shown(coming.request.url)} answered with more than {most} bytes")
        parts.append(part)
    headers = [pair for pair in coming.headers.multi_items() if pair[0] in ("content-type", "retry-after")]
    return httpx.Response(coming.status_code, headers=headers, content=b"".join(parts), request=coming.request)


def shown(url: httpx.URL) -> str:
    """An address as it may be logged: without user and password."""
    return str(url.copy_with(username=None, password=None))


def last_line(text: str) -> str:
    """The end of an error page or a traceback, which has the reason."""
    lines = text.strip().splitlines()
    return lines[-1][:500] if lines else "(empty)"
