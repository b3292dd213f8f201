"""Reference answers: where they stand in the answer field."""

from __future__ import annotations

import re
from typing import Literal

GoldKind = Literal["as_is", "gsm8k", "boxed", "auto"]

_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def extract_gold(answer: str, kind: GoldKind) -> str:
    """The reference answer within `answer`.

    `gsm8k`: after the last `####`, to the end of the line, without thousands separators (`#### 1,000` gives `1000`);
    `boxed`: inside the last balanced `\\boxed{}`; `auto`: whichever of the two comes last, or all of it where there is
    neither; `as_is`: all of it.

    Raises:
        ValueError: it is not there, or empty; says what was looked for.
    """
    hashes, box = answer.rfind("####"), answer.rfind("\\boxed{")
    if kind == "auto":
        kind = "gsm8k" if hashes > box else "boxed" if box > hashes else "as_is"
    if kind == "gsm8k":
        line = answer[hashes + 4 :].strip().partition("\n")[0]
        gold = None if hashes < 0 else _COMMA_IN_NUMBER.sub("", line)
        looked_for = "an answer after `####`"
    elif kind == "boxed":
        gold = _boxed(answer, box)
        looked_for = "an answer in a balanced `\\boxed{}`"
    else:
        gold, looked_for = answer, "an answer"
    if gold is None or not gold.strip():
        raise ValueError(f"{looked_for} was expected, got {_shortened(answer)!r}")
    return gold.strip()


def _boxed(text: str, start: int) -> str | None:
    """Inside of the `\\boxed{` at `start`, up to the brace that closes it."""
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        character = text[position]
        if character in "{}" and text[position - 1] != "\\":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start:position]
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
