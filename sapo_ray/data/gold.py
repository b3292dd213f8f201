"""Reference answers: where they stand in the answer field."""

from __future__ import annotations

import re
from typing import Literal

from sapo_ray.data.marked import last_boxed, last_gsm8k

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
    hashes, box = answer.rfind("####"), answer.rfind("\\boxed")
    if kind == "auto":
        kind = "gsm8k" if hashes > box else "boxed" if box > hashes else "as_is"
    gold: str | None = answer
    looked_for = "an answer"
    if kind == "gsm8k":
        found = last_gsm8k(answer, numbers_only=False)
        gold = None if found is None else _COMMA_IN_NUMBER.sub("", found.answer)
        looked_for = "an answer after `####`"
    elif kind == "boxed":
        found = last_boxed(answer)
        # A reference whose last box is cut off is not the box before it.
        gold = None if found is None or found.start != box else found.answer
        looked_for = "an answer in a balanced `\\boxed{}`"
    if gold is None or not gold.strip():
        raise ValueError(f"{looked_for} was expected, got {_shortened(answer)!r}")
    return gold.strip()


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
