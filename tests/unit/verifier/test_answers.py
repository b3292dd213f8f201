"""Where an answer stands, and its plain form."""

from __future__ import annotations

import time

import pytest

from sapo_ray.verifier.answers import AnswerForm, extract_answer, plain_form


@pytest.mark.parametrize(
    ("form", "completion", "answer"),
    [
        ("boxed", r"so \boxed{42}.", "42"),
        ("boxed", r"\boxed{1} no, \boxed{2}", "2"),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed {7}", "7"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{x = \boxed{3}}", "3"),
        ("boxed", r"\boxed{5} and then \boxed{6", "5"),
        ("boxed", r"{ \boxed{5}", "5"),
        ("boxed", r"} \boxed{5} }", "5"),
        ("boxed", r"\boxed{}", None),
        ("boxed", r"\boxed{ }", None),
        ("boxed", r"\boxed 5", None),
        ("boxed", "#### 5", None),
        ("boxed", "", None),
        ("gsm8k", "a\n#### 1,080\n", "1,080"),
        ("gsm8k", "#### 1\n#### $2", "$2"),
        ("gsm8k", "####-3", "-3"),
        ("gsm8k", "##### 3", None),
        ("gsm8k", r"\boxed{3}", None),
        ("tag", "<answer> 5 </answer>", "5"),
        ("tag", "<answer>4</answer> <answer>5</answer>", "5"),
        ("tag", r"<answer>It is \boxed{5}.</answer>", "5"),
        ("tag", "<answer>5", None),
        ("tag", "5</answer>", None),
        ("auto", r"\boxed{1} #### 2 <answer>3</answer>", "3"),
        ("auto", r"<answer>3</answer> #### 2 \boxed{1}", "1"),
        ("auto", "\\boxed{1} <answer>3</answer>\n#### 2", "2"),
        ("auto", "<think>\\boxed{1}</think> <answer>\\boxed{2}</answer>", "2"),
        ("auto", "\\boxed{1}\n\n#### Step 2: look again", "1"),
        ("auto", "\\boxed{1}\n\n#### 2. Look again", "1"),
        ("auto", "#### **18**", "**18**"),
        ("auto", "#### 18 dollars", "18 dollars"),
        ("auto", "the answer is 5", None),
    ],
)
def test_the_answer_is_taken_from_where_it_stands(form: AnswerForm, completion: str, answer: str | None) -> None:
    assert extract_answer(completion, form) == answer


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("42", "42"),
        (" $42$ ", "42"),
        (r"\(42\)", "42"),
        ("**42**", "42"),
        ("42.", "42"),
        ("$1,234.50$", "1234.50"),
        ("$5,000", "5000"),
        (r"-\$5", "-5"),
        (r"1{,}234", "1234"),
        (r"1\,234", "1234"),
        (r"12,\!345", "12345"),
        ("18 dollars", "18"),
        ("3/4 cups of flour", "3/4"),
        ("12 million", "12 million"),
        ("2 or 3", "2 or 3"),
        ("5 x", "5 x"),
        (r"\text{even}", "even"),
        ("1,2", "1,2"),
        ("12,34", "12,34"),
        ("1,234,5", "1,234,5"),
        ("$x$ or $y$", "$x$ or $y$"),
        ("", ""),
    ],
)
def test_the_plain_form_drops_dress_and_keeps_the_value(written: str, plain: str) -> None:
    assert plain_form(written) == plain


MEGABYTES = {
    "boxes": "\\boxed{" * 150_000,
    "braces": "{" * 1_000_000 + "\\boxed{",
    "backslashes": "\\" * 1_000_001,
    "tags": "<answer>" * 120_000,
    "hashes": "#" * 1_000_000,
    "lines": "#### 1 " * 150_000,
    "closing": "\\boxed{" + "}" * 1_000_000,
    "digits": "#### " + "1" * 1_000_000 + "x",
    "blanks": "#### 1" + " " * 1_000_000 + "-",
}


@pytest.mark.parametrize("completion", MEGABYTES.values(), ids=MEGABYTES.keys())
def test_a_megabyte_of_markers_costs_linear_time(completion: str) -> None:
    def seconds(text: str) -> float:
        started = time.process_time()
        extract_answer(text, "auto")
        return time.process_time() - started

    # Quadratic work on a megabyte would take hours; this only has to tell the two apart.
    assert seconds(completion) < 10
