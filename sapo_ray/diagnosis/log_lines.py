"""The part of a log that tells: the last error of a process, or its last lines."""

from __future__ import annotations

import re

TAIL_BYTES = 64 << 10
"""Of a log that is read."""
MOST_LINES = 8
LONGEST = 300
_HEAD = "--- "
"""Begins a process's lines in the log of its role (actor_log.py)."""
_ERROR = re.compile(
    r"(?<![a-z])(error|exception|fatal|killed|abort|traceback|segmentation|out of memory)", re.IGNORECASE
)
_RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b")


def telling(text: bytes) -> list[str]:
    """At most MOST_LINES lines of the newest process in a log, up to its last error where there is one."""
    lines = [line.rstrip()[:LONGEST] for line in text.decode("utf-8", "replace").splitlines()]
    start = max((at for at, line in enumerate(lines) if line.startswith(_HEAD)), default=-1)
    lines = [line for line in lines[start + 1 :] if line.strip()]
    raised = [at for at, line in enumerate(lines) if _RAISED.match(line)]
    errors = raised or [at for at, line in enumerate(lines) if _ERROR.search(line)]
    end = errors[-1] + 1 if errors else len(lines)
    return lines[max(0, end - MOST_LINES) : end]


def file_of(component: str) -> str:
    """Name of a part's log below `logs/`."""
    return "learner-0.log" if component == "learner" else f"{component}.log"
