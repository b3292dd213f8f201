"""Where the answer stands in a completion, and the plain form that is compared.

Every function is linear in the length of its input, because completions are written by a policy that is free to
write a megabyte of open braces.
"""

from __future__ import annotations

import re
from typing import Literal

from sapo_ray.data.marked import Found, last_boxed, last_gsm8k

AnswerForm = Literal["auto", "boxed", "gsm8k", "tag"]


class OwnBoundExceeded(Exception):
    """math-verify's own bound ran out, because nobody killed the process at the deadline."""


def extract_answer(completion: str, form: AnswerForm) -> str | None:
    """The answer as written, or None where there is none (an empty one counts as none).

    `boxed`: in the last balanced `\\boxed{}`; `gsm8k`: after the last `####`, to the end of the line; `tag`: in the
    last `<answer>...</answer>`; `auto`: whichever of these begins last.
    """
    found: list[Found | None] = []
    if form in ("boxed", "auto"):
        found.append(last_boxed(completion))
    if form in ("gsm8k", "auto"):
        found.append(last_gsm8k(completion, numbers_only=form == "auto"))
    if form in ("tag", "auto"):
        found.append(_last_tag(completion))
    last = max((f for f in found if f is not None), default=None)
    if last is None:
        return None
    answer = last.answer.strip()
    if "\\boxed" in answer and (inner := last_boxed(answer)) is not None:
        answer = inner.answer.strip()
    return answer or None


def _last_tag(text: str) -> Found | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return None if start < 0 else Found(start, text[start + len("<answer>") : end])


_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|textrm)\{([^{}]*)\}")
_SIGN_AND_CURRENCY = re.compile(r"([-+]?)\s*\\?[$€£]\s*([-+]?)(?=[\d.])")
_SEPARATED = re.compile(r"[-+]?\d{1,3}(?:(?:,\\!|\\!|\{,\}|\\,|,)\d{3})+(?:\.\d+)?(?![\d,])")
_SEPARATOR = re.compile(r",\\!|\\!|\{,\}|\\,|,")
_NUMBER_AND_UNIT = re.compile(r"([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:/\d+)?)\s+([A-Za-z]{2,}(?:[ ][A-Za-z]+){0,3})")
# Words after a number that are part of its value, not a unit.
_NOT_UNITS = frozenset(
    ["hundred", "thousand", "million", "billion", "dozen", "percent", "pct", "pi", "sqrt", "or", "and"]
)


def plain_form(answer: str) -> str:
    """The same answer without dress: mathematics delimiters, bold, currency, thousands separators, a number's unit.

    `"$1,234.50$"` -> `"1234.50"`, `"18 dollars."` -> `"18"`, `"\\text{even}"` -> `"even"`. What it does not know it
    leaves as it is; values are never changed.
    """
    text = answer.strip()
    for left, right in _WRAPPERS:
        if len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : len(text) - len(right)]
            text = text if left in inner else inner.strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    if (wrapped := _TEXT.fullmatch(text)) is not None:
        text = wrapped.group(1).strip()
    text = _SIGN_AND_CURRENCY.sub(r"\1\2", text, count=1) if _SIGN_AND_CURRENCY.match(text) else text
    if (separated := _SEPARATED.match(text)) is not None:
        text = _SEPARATOR.sub("", separated.group()) + text[separated.end() :]
    if (unit := _NUMBER_AND_UNIT.fullmatch(text)) is not None and _NOT_UNITS.isdisjoint(unit.group(2).lower().split()):
        text = unit.group(1)
    return text
