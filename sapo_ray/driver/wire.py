"""One call to the control plane, bounded, its answers in our words.

200                       what was asked for
409 superseded            Superseded      another attempt has the run
409 sequence_gap          SequenceGap     go on from the number it names
413                       TooLarge        send less at once
422, 400 of its own       Unacceptable    it does not take an event as it is
401 unauthenticated       Unauthorized    not this attempt's token, or no such job
anything else             Away            503, a proxy's page, no connection, no answer in time: try again later

Fields that this version does not know are passed over: a control plane is upgraded while drivers run.

A status counts with the control plane's own problem code only: proxies have 401s, 404s and 409s of their own.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from typing import Any

import httpx
from pydantic import ValidationError

from sapo_ray.api.link import Assignment, DriverEvents, Received
from sapo_ray.errors import Superseded

CALL_S = 10.0
"""Bound of one call, from the connection to the last byte of the answer."""
CONNECT_S = 3.0
REFUSALS, REFUSED_S = 3, 300.0
"""So many refused tokens, the last so long after the first, mean that the attempt is not wanted any more;
SAPO_LINK_REFUSED_S sets the time."""
ANSWER_BYTES = 4 << 20
"""An assignment holds a whole job; no answer is longer than this."""


class Away(Exception):
    """No usable answer; `retry_after` is what the other side asked for, in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Unauthorized(Away):
    """The token is not known for this attempt."""


class Refusals:
    """Refused tokens since one was taken: a control plane may be without its database's newest part for a while."""

    def __init__(self) -> None:
        self.within_s = float(os.environ.get("SAPO_LINK_REFUSED_S", REFUSED_S))
        self._count = 0
        self._first = 0.0

    def add(self) -> bool:
        """Count one. Returns whether they are enough, and over long enough, to be meant."""
        if not self._count:
            self._first = time.monotonic()
        self._count += 1
        return self._count >= REFUSALS and time.monotonic() - self._first >= self.within_s

    def clear(self) -> None:
        """The token is good."""
        self._count = 0


class TooLarge(Exception):
    """The batch is larger than the receiver takes."""


class Unacceptable(Exception):
    """Something in the batch is not as the receiver wants it; it will not be the next time either."""


class SequenceGap(Exception):
    """The receiver has everything before `expected`, and nothing from there on."""

    def __init__(self, expected: int) -> None:
        super().__init__(f"expected event {expected}")
        self.expected = expected


class Wire:
    """Calls of one attempt of one job. Use from one thread at a time."""

    def __init__(self, control: str, job: str, attempt: int, token: str) -> None:
        # No proxy of the environment: the control plane is part of the installation, and the token is for it alone.
        self._client = httpx.Client(
            base_url=f"{control.rstrip('/')}/v1/link/{job}/{attempt}/",
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(CALL_S, connect=CONNECT_S),
            trust_env=False,
            verify=ssl.create_default_context() if control.startswith("https:") else False,
        )
        self._name = f"attempt {attempt} of {job}"

    def assignment(self) -> Assignment:
        """What this driver is to do."""
        body = self._call("GET", "assignment")
        try:
            return Assignment.model_validate(body, extra="ignore")
        except ValidationError as error:
            # Not as pydantic writes it: that shows what came, and secrets are in it.
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise Away(f"its assignment is not understood: {wrong}") from None

    def deliver(self, first_seq: int, events: list[dict[str, Any]]) -> Received:
        """Hand over events; an empty list is a heartbeat."""
        delivery = DriverEvents(first_seq=first_seq, events=events)
        body = self._call("POST", "events", delivery.model_dump_json().encode())
        try:
            return Received.model_validate(body, extra="ignore")
        except ValidationError as error:
            raise Away(f"its answer is not understood: {error}") from error

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, path: str, content: bytes | None = None) -> Any:
        headers = {"Content-Type": "application/json"} if content is not None else {}
        end = time.monotonic() + CALL_S
        try:
            with self._client.stream(method, path, content=content, headers=headers) as response:
                text = b""
                for chunk in response.iter_bytes():
                    text += chunk
                    if time.monotonic() > end or len(text) > ANSWER_BYTES:
                        raise Away(f"its answer did not end within {CALL_S:g} s or {ANSWER_BYTES} bytes")
        except httpx.HTTPError as error:
            raise Away(f"{type(error).__name__}: {error}") from error
        body = _json(text)
        if response.status_code == 200 and body is not None:
            return body
        raise self._refusal(response, body if isinstance(body, dict) else {})

    def _refusal(self, response: httpx.Response, problem: dict[str, Any]) -> Exception:
        code, status = problem.get("code"), response.status_code
        if status == 409 and code == "superseded":
            return Superseded(f"{self._name} was superseded: {problem.get('detail', 'by a later one')}")
        if status == 409 and code == "sequence_gap" and isinstance(expected := problem.get("expected"), int):
            return SequenceGap(expected)
        if status == 413:
            return TooLarge(f"it takes less at once: {problem.get('detail', 'status 413')}")
        reason = f"status {status} {code or ''}: {problem.get('detail', '')}".strip(" :")
        if status in (400, 422) and isinstance(code, str):
            return Unacceptable(_what_is_wrong(reason, problem))
        if status == 401 and code == "unauthenticated":
            return Unauthorized(reason)
        return Away(reason, _seconds(response.headers.get("Retry-After")))


def _what_is_wrong(reason: str, problem: dict[str, Any]) -> str:
    """With the first of the fields that are named."""
    errors = problem.get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    return f"{reason} ({first.get('param')}: {first.get('detail')})" if first else reason


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _seconds(value: str | None) -> float | None:
    """Retry-After where it is a number; a date is nobody's habit here."""
    return float(value) if value is not None and value.isdecimal() else None
