"""Answers that a marker announces: `\\boxed{...}` and `#### ...`. One rule for references and for completions.

Every function is linear in the length of its input, because completions are written by a policy that is free to
write a megabyte of open braces.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Found(NamedTuple):
    """An answer in a text; of two, the one that begins later is the larger."""

    start: int
    """Where its marker begins, in characters."""
    answer: str


_BOX_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_GSM8K = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
# `####` is also a Markdown heading.
_GSM8K_NUMBER = re.compile(
    r"[-+]?\s?\\?\$?\s?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?\s*\\?%?(?:\s[A-Za-z]+){0,3}\.?"
)


def last_boxed(text: str) -> Found | None:
    """Content of the balanced box that begins last; escaped braces do not count."""
    first = text.find("\\boxed")
    if first < 0:
        return None
    open_braces: list[tuple[int, int]] = []  # (start of the box's marker or -1, start of the content)
    last: Found | None = None
    for token in _BOX_TOKEN.finditer(text, first):
        what = token.group()
        if what == "{":
            open_braces.append((-1, token.end()))
        elif what == "}":
            if open_braces:
                start, content = open_braces.pop()
                if start >= 0 and (last is None or start > last.start):
                    last = Found(start, text[content : token.start()])
        elif what.startswith("\\boxed"):
            open_braces.append((token.start(), token.end()))
    return last


def last_gsm8k(text: str, *, numbers_only: bool) -> Found | None:
    """The rest of the line after the last `####`; on request only a number, with a unit of up to three words."""
    last: Found | None = None
    for match in _GSM8K.finditer(text) if "####" in text else ():
        line = match.group(1).strip()
        if not numbers_only or _GSM8K_NUMBER.fullmatch(line.strip("*$ ")):
            last = Found(match.start(), line)
    return last
