"""Structured logs: one JSON object a line, with the request's and the job's id, and without secrets."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from structlog.typing import Processor

_SECRET_NAMES = re.compile(r"authorization|secret|token$|api_?key|password|cookie", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"sapo_[A-Za-z0-9_-]{16,}|(?i:bearer)\s+[^\s\"',]+|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")
HIDDEN = "[hidden]"


def hide(value: Any, name: str = "") -> Any:
    """`value` with whatever is, or looks like, a secret replaced: by its name, as a key, a bearer token or in a URL."""
    if name and _SECRET_NAMES.search(name) and value is not None:
        return HIDDEN
    if isinstance(value, str):
        return _SECRET_TEXT.sub(HIDDEN, value)
    if isinstance(value, dict):
        return {key: hide(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [hide(one) for one in value]
    return value


def _redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if not name.startswith("_"):
            event[name] = hide(value, name)
    return event


def configure(level: str = "info") -> None:
    """Send structlog's and the standard library's lines to stderr as JSON. Idempotent; for the service's process."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # without local variables, which hold keys and prompts
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _redact,
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # The service writes its own line per request, with the ids that uvicorn's lacks; httpx's would repeat the launcher.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in ("uvicorn.access", "httpx", "httpcore"):
        logging.getLogger(name).setLevel("WARNING")
