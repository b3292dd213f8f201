"""Reference answers within answer fields."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sapo_ray.data.gold import GoldKind, extract_gold


@pytest.mark.parametrize(
    ("answer", "kind", "gold"),
    [
        ("He has 70 + 2.\n#### 72", "gsm8k", "72"),
        ("#### 2,520,000", "gsm8k", "2520000"),
        ("#### -7 \n", "gsm8k", "-7"),
        ("#### 5 apples, 3 pears", "gsm8k", "5 apples, 3 pears"),
        ("#### 1\n#### 2\nchecked", "gsm8k", "2"),
        (r"so \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}", "boxed", "2"),
        (r"\boxed{\{1, 2\}}", "boxed", r"\{1, 2\}"),
        ("#### 72", "auto", "72"),
        (r"thus \boxed{x^{2}}", "auto", "x^{2}"),
        (r"\boxed{3} in short #### 4", "auto", "4"),
        (r"#### Heading, then \boxed{5}", "auto", "5"),
        (r"\boxed {8}", "auto", "8"),
        (" 204 ", "auto", "204"),
        ("(1,000)", "as_is", "(1,000)"),
        ("#### 72", "as_is", "#### 72"),
    ],
)
def test_the_reference_is_found_where_it_stands(answer: str, kind: GoldKind, gold: str) -> None:
    assert extract_gold(answer, kind) == gold


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ("72", "gsm8k", "an answer after `####` was expected, got '72'"),
        ("####  ", "gsm8k", "an answer after `####` was expected, got '####  '"),
        ("72", "boxed", r"an answer in a balanced `\boxed{}` was expected, got '72'"),
        (r"\boxed{\frac{1}{2}", "boxed", r"an answer in a balanced `\boxed{}` was expected"),
        (r"\boxed{1} and then \boxed{2", "boxed", r"an answer in a balanced `\boxed{}` was expected"),
        (r"\boxed{ }", "auto", r"an answer in a balanced `\boxed{}` was expected"),
        ("  ", "as_is", "an answer was expected, got '  '"),
        ("x" * 200, "gsm8k", "got '" + "x" * 77 + "...'"),
    ],
)
def test_a_missing_reference_says_what_was_looked_for(answer: str, kind: GoldKind, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        extract_gold(answer, kind)


def test_every_reference_of_gsm8k_is_a_plain_number(shared: Path) -> None:
    for name in ("train", "test"):
        lines = (shared / "data" / "gsm8k" / f"{name}.jsonl").read_text().splitlines()
        golds = [extract_gold(json.loads(line)["answer"], "auto") for line in lines]
        assert [gold for gold in golds if not re.fullmatch(r"-?\d+(\.\d+)?", gold)] == []
