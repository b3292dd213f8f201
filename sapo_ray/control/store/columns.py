"""Column types that take whatever drivers and users write, on both databases."""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import JSON, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

REPLACEMENT = "\ufffd"


def clean_text(value: str) -> str:
    """Without what PostgreSQL cannot hold or UTF-8 cannot say: NUL, lone surrogates."""
    return value.replace("\0", REPLACEMENT).encode("utf-8", "replace").decode("utf-8")


def clean(value: Any) -> Any:
    """The same value as strict JSON: numbers that are not finite become null, texts are cleaned."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {clean_text(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


class CleanText(TypeDecorator[str]):
    """Text of any origin."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else clean_text(value)


class CleanJson(TypeDecorator[Any]):
    """JSON of any origin. Python's None is SQL's NULL."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return clean(value)
