"""Values of secrets do not get into journals, results and logs, whoever's error message brings them along.

A library that is refused may quote the address, or the header, that it sent. A value is masked where it stands as it
is; one that a library encodes or cuts is not recognised.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from sapo_ray.config.spec import JobSpec

SHORTEST = 6
"""A shorter value is no secret worth the name, and would be found in many a word."""
MASK = "***"
Hidden = tuple[str, ...]
"""Values to be masked, longest first: one may be a part of another."""


def hidden(values: Iterable[str]) -> Hidden:
    """What is to be masked of secrets with these values."""
    return tuple(sorted({value for value in values if len(value) >= SHORTEST}, key=len, reverse=True))


def hidden_of(spec: JobSpec) -> Hidden:
    """What is to be masked of the job's secrets in this process's environment."""
    return hidden(os.environ.get(name, "") for name in spec.secrets)


def masked(value: Any, hide: Hidden) -> Any:
    """A text, or all texts in what JSON can hold, without them."""
    if isinstance(value, str):
        for one in hide:
            value = value.replace(one, MASK)
        return value
    if isinstance(value, dict):
        return {masked(key, hide): masked(inner, hide) for key, inner in value.items()}
    return [masked(inner, hide) for inner in value] if isinstance(value, list | tuple) else value


class MaskingFormatter(logging.Formatter):
    """Writes lines, tracebacks included, without them."""

    def __init__(self, line: str, hide: Hidden) -> None:
        super().__init__(line)
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        return str(masked(super().format(record), self._hide))
