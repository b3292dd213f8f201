"""When to ask again, and after how long. Pure but for the clock and chance handed in."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MAX_RETRY_AFTER_S = 120.0
"""A service that asks for more patience than this is an error at once, with its wish in `retry_after`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """Waits that double, with chance in them so that many clients do not come back as one."""

    first_s: float = 0.25
    """Longest first wait."""
    longest_s: float = 10.0
    """No wait is longer, but for what Retry-After asks."""

    def wait_s(self, failures: int, retry_after: float | None = None) -> float:
        """Seconds to wait after so many failures in a row (from 1). What the service asks for is the least."""
        longest = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 16))
        chance = random.uniform(0.5, 1.0) * longest
        return chance if retry_after is None else retry_after + 0.1 * chance


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it holds neither."""
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
