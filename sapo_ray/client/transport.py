"""HTTP to the service: one place that knows keys, deadlines, retries and what an error looks like."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx
from pydantic import ValidationError

from sapo_ray import __version__
from sapo_ray.api.problems import Problem
from sapo_ray.client.errors import (
    ApiError,
    BadReply,
    ConnectionFailed,
    NotFound,
    RateLimited,
    Unavailable,
    from_problem,
)
from sapo_ray.client.retry import MAX_RETRY_AFTER_S, Backoff, retry_after_s
from sapo_ray.errors import ConfigError

log = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:8800"
TIMEOUT_S = 30.0
CONNECT_S = 10.0
RETRIES = 5
MAX_REPLY_BYTES = 256 << 20
"""No answer but a file is this large."""
_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_STATUSES = frozenset(HTTPStatus)
_LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
Params = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    headers: httpx.Headers
    body: bytes
    url: str

    def json(self) -> Any:
        """The body's JSON.

        Raises:
            BadReply: it is something else; mostly the URL is that of another service.
        """
        try:
            return json.loads(self.body)
        except ValueError:
            kind = self.headers.get("content-type", "no content type")
            raise BadReply(
                f"{self.url} answered {self.status} with {kind} in place of JSON; "
                "is SAPO_URL the address of a sapo-ray service?"
            ) from None

    def text(self) -> str:
        """The body as text; bytes that are not UTF-8 are shown as U+FFFD."""
        return self.body.decode("utf-8", errors="replace")


class Transport:
    """Requests to one service with one key. May be shared by threads.

    A request that fails is made again, at most 5 times, where that cannot do harm: GET, PUT, DELETE, any request
    that carries an idempotency key, and any request that verifiably was not looked at (no connection, 429). It waits
    as long as Retry-After says, else twice as long after each failure, at most 10 s.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
        backoff: Backoff | None = None,
    ) -> None:
        self.base_url = _checked_url(base_url or os.environ.get("SAPO_URL") or DEFAULT_URL)
        self._key = _checked_key(api_key or os.environ.get("SAPO_API_KEY"))
        if not timeout > 0:
            raise ConfigError(f"timeout must be > 0 seconds, got {timeout!r}")
        self.timeout = timeout
        self.backoff = backoff or Backoff()
        self._retries = retries
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_S, timeout)),
            headers={"User-Agent": f"sapo-ray/{__version__}"},
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=8, keepalive_expiry=4.0),
            # A proxy of the environment is for the world outside, not for a service on this machine.
            trust_env=httpx.URL(self.base_url).host not in _LOCAL,
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: Any = None,
        content: Callable[[], Iterator[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        read_timeout: float | None = None,
    ) -> Reply:
        """A whole answer of status 2xx. `body` is sent as JSON, `content` as it comes, anew for each try.

        Raises:
            ApiError: the service answered with an error (see the tree in `errors`).
            ConnectionFailed: it did not answer, after all retries.
            ConfigError: there is no API key.
        """
        sent = dict(headers or {})
        if idempotency_key is not None:
            sent["Idempotency-Key"] = idempotency_key
        harmless = method in _IDEMPOTENT or idempotency_key is not None
        failures = 0
        while True:
            try:
                with self.stream(
                    method,
                    path,
                    params=params,
                    body=body,
                    content=None if content is None else content(),
                    headers=sent,
                    read_timeout=read_timeout,
                ) as response:
                    return self.whole(response)
            except (ConnectionFailed, ApiError) as error:
                if method == "DELETE" and failures and isinstance(error, NotFound):
                    return Reply(status=204, headers=httpx.Headers(), body=b"", url=path)  # gone by an earlier try
                failures += 1
                if failures > self._retries or not _worth_another(error, harmless=harmless):
                    raise
                wait = self.backoff.wait_s(failures, getattr(error, "retry_after", None))
                log.info("%s %s: %s; again in %.1f s", method, path, error, wait)
            time.sleep(wait)

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: Any = None,
        content: Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        read_timeout: float | None = None,
        public: bool = False,
        also: frozenset[int] = frozenset(),
    ) -> Iterator[httpx.Response]:
        """One attempt: an answer of status 2xx, or one in `also`, whose body is still to be read. Raises as `request`.

        `public` endpoints need no key.
        """
        where = f"{method} {path}"
        request = self._http.build_request(
            method,
            path,
            params={key: value for key, value in (params or {}).items() if value is not None},
            content=_json(body) if body is not None else content,
            headers=self._headers(headers, public=public, is_json=body is not None),
            timeout=httpx.Timeout(read_timeout or self.timeout, connect=min(CONNECT_S, self.timeout)),
        )
        try:
            response = self._http.send(request, stream=True)
            try:
                if not response.is_success and response.status_code not in also:
                    raise _error(self.whole(response), where)
                yield response
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise ConnectionFailed(_unreachable(error, where, self.base_url)) from error

    def _headers(self, headers: Mapping[str, str] | None, *, public: bool, is_json: bool) -> dict[str, str]:
        sent = {"Accept": "application/json", **(headers or {})}
        if is_json:
            sent["Content-Type"] = "application/json"
        if self._key is not None:
            sent["Authorization"] = f"Bearer {self._key}"
        elif not public:
            raise ConfigError(
                f"no API key for {self.base_url}; set SAPO_API_KEY, or pass api_key= to Client. `sapo-ray serve` "
                "prints the first one when it starts for the first time"
            )
        return sent

    def whole(self, response: httpx.Response) -> Reply:
        """Read it within the timeout: httpx bounds each read by itself, which a slow drip would outlast."""
        end = time.monotonic() + self.timeout
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if time.monotonic() > end:
                raise httpx.ReadTimeout(f"the answer was not whole after {self.timeout:g} s", request=response.request)
            if len(body) > MAX_REPLY_BYTES:
                raise BadReply(f"{response.request.url} answered with more than {MAX_REPLY_BYTES >> 20} MiB")
        url = str(response.request.url)
        return Reply(status=response.status_code, headers=response.headers, body=bytes(body), url=url)


def new_key() -> str:
    """An idempotency key that no other request has."""
    return uuid.uuid4().hex


def _worth_another(error: ConnectionFailed | ApiError, *, harmless: bool) -> bool:
    if isinstance(error, ConnectionFailed):
        # These came before a byte was sent.
        return harmless or isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    if error.retry_after is not None and error.retry_after > MAX_RETRY_AFTER_S:
        return False
    if isinstance(error, RateLimited):
        return True
    # A conflict that says when to come back: an earlier request with this idempotency key is still at work.
    return harmless and (isinstance(error, Unavailable) or (error.status == 409 and error.retry_after is not None))


def _error(reply: Reply, where: str) -> ApiError:
    retry_after = retry_after_s(reply.headers.get("retry-after"))
    try:
        problem = Problem.model_validate_json(reply.body)
    except ValidationError:  # a proxy in between, or another service
        meaning = HTTPStatus(reply.status).phrase if reply.status in _STATUSES else "error"
        text = " ".join(reply.text().split())[:200]
        detail = f"{meaning}{f': {text}' if text and '<' not in text else ''}"
        problem = Problem(title=meaning, status=reply.status, code="not_a_problem", detail=detail)
    return from_problem(problem, where, retry_after)


def _unreachable(error: httpx.HTTPError, where: str, base_url: str) -> str:
    if isinstance(error, httpx.ConnectError):
        said = "; is it running (sapo-ray serve), and is SAPO_URL right?"
        return f"no service at {base_url} ({str(error) or 'connection failed'}){said}"
    if isinstance(error, httpx.TimeoutException):
        return f"{base_url} did not answer {where} in time ({str(error) or type(error).__name__})"
    return f"the connection to {base_url} broke off during {where} ({str(error) or type(error).__name__})"


def _json(body: Any) -> bytes:
    try:
        return json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the request cannot be written as JSON: {error}") from None


def _checked_url(text: str) -> str:
    try:
        url = httpx.URL(text.strip())
    except httpx.InvalidURL as error:
        raise ConfigError(f"SAPO_URL {text!r} is not a URL ({error}); write e.g. {DEFAULT_URL}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"SAPO_URL must be like {DEFAULT_URL}, got {text!r}")
    return str(url).rstrip("/")


def _checked_key(text: str | None) -> str | None:
    """Keys are pasted, often with a newline; the message does not show the key."""
    key = (text or "").strip()
    if not key:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("SAPO_API_KEY holds characters that no key has (spaces or non-ASCII); copy it again")
    return key
