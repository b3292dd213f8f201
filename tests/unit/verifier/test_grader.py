"""Verdicts of the real grader, math-verify included."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.errors import ConfigError
from sapo_ray.types import Verdict
from sapo_ray.verifier.answers import extract_answer
from sapo_ray.verifier.grader import Grader
from sapo_ray.verifier.rewards import think_answer_format

CORRECT = [
    ("42", "42"),
    ("1,234", "1234"),
    ("1234", "1{,}234"),
    (r"\$18", "18"),
    ("18 dollars", "18"),
    ("+5", "5"),
    ("007", "7"),
    ("0.5", r"\frac12"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"\dfrac{3}{4}", "0.75"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"2\frac{1}{2}", r"\frac52"),
    ("0.333333", r"\frac13"),
    (r"50\%", "0.5"),
    ("50%", r"\frac{1}{2}"),
    (r"50\%", "50"),
    ("50 percent", r"50\%"),
    (r"\{3,1,2\}", r"\{1,2,3\}"),
    ("3, 2, 1", r"\{1,2,3\}"),
    (r"\pm 2", "2,-2"),
    ("[1,2)", "[1,2)"),
    (r"5\text{ cm}", "5"),
    (r"90^\circ", "90"),
    ("$1,080.50", "1080.5"),
    (r"5 \times 10^3", "5000"),
    (r"3\sqrt{2}", r"\sqrt{18}"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("2+3i", "3i+2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\text{(C)}", "C"),
    (r"\text{Even}", "even"),
    ("North West", r"\text{north west}"),
    (r"\emptyset", r"\emptyset"),
    ("Cat", "cat"),
    ("No", "no"),
    (r"\text{dne}", "DNE"),
    ("yx", "xy"),
    ("BA", "AB"),
    ("zyx", "xyz"),
    ("bca", "abc"),
    ("hmg", "mgh"),
    (r"x \cdot y \cdot a", "axy"),
    ("上海", "上海"),
]
WRONG = [
    ("41", "42"),
    ("-3", "3"),
    ("12 million", "12"),
    ("0.333", r"\frac13"),
    ("[1,2]", "(1,2)"),
    ("(2,1)", "(1,2)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("x=5", "y=5"),
    ("B", "A"),
    (r"\text{odd}", "even"),
    ("dayMon", "Monday"),
    ("act", "cat"),
    ("cat", "act"),
    ("Nom", "Mon"),
    ("end", "DNE"),
    ("ACT", r"\text{CAT}"),
    ("yes", "no"),
    ("no", "yes"),
    ("xa", "axy"),
    ("海上", "上海"),
    (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("5 or 6", "5"),
    ("12,34", "1234"),
]


@pytest.fixture(scope="module")
def grader() -> Grader:
    return Grader(VerifierSpec())


@pytest.mark.parametrize(("answer", "gold"), CORRECT)
def test_equal_answers_are_correct(grader: Grader, answer: str, gold: str) -> None:
    grading = grader.grade(f"It is \\boxed{{{answer}}}.", gold)
    assert (grading.verdict, grading.reward, grading.reason) == (Verdict.CORRECT, 1.0, "match")


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_different_answers_are_wrong(grader: Grader, answer: str, gold: str) -> None:
    grading = grader.grade(f"It is \\boxed{{{answer}}}.", gold)
    assert (grading.verdict, grading.reward, grading.reason) == (Verdict.WRONG, 0.0, "mismatch")


@pytest.mark.parametrize(
    ("completion", "gold", "verdict", "reason"),
    [
        ("I do not know", "5", Verdict.WRONG, "no_answer"),
        ("", "5", Verdict.WRONG, "no_answer"),
        (r"\boxed{5", "5", Verdict.WRONG, "no_answer"),
        ("<answer>}{</answer>", "5", Verdict.WRONG, "unparseable"),
        ("<answer>?!</answer>", "5", Verdict.WRONG, "unparseable"),
        (r"\boxed{5}", r"\frac{1}{", Verdict.ERROR, "gold_unparseable"),
        (r"\boxed{5}", "", Verdict.ERROR, "gold_unparseable"),
        ("no answer", "?!", Verdict.ERROR, "gold_unparseable"),
        (r"\boxed{?!}", "?!", Verdict.ERROR, "gold_unparseable"),
        (r"\boxed{5}", "1" * 1001, Verdict.ERROR, "gold_unparseable"),
        (r"\boxed{" + "1" * 1001 + "}", "5", Verdict.ERROR, "too_long"),
        (r"\boxed{" + "1" * 1000 + "}", "5", Verdict.WRONG, "mismatch"),
        ("\\boxed{5}\x00", "5", Verdict.CORRECT, "match"),
        ("\\boxed{5\ud800}", "5", Verdict.WRONG, "unparseable"),
    ],
)
def test_a_verdict_has_its_reason(grader: Grader, completion: str, gold: str, verdict: Verdict, reason: str) -> None:
    grading = grader.grade(completion, gold)
    assert (grading.verdict, grading.reason) == (verdict, reason)
    assert (grading.reward is None) == (verdict is Verdict.ERROR)


def test_shortcuts_and_caches_change_no_verdict() -> None:
    fast, plain = Grader(VerifierSpec()), Grader(VerifierSpec(), shortcuts=False)
    for answer, gold in [*CORRECT, *WRONG]:
        completion = f"\\boxed{{{answer}}}"
        verdict = plain.grade(completion, gold).verdict
        assert fast.grade(completion, gold).verdict is verdict, (answer, gold)
        assert fast.grade(completion, gold).verdict is verdict, (answer, gold)


@pytest.mark.parametrize("form", ["boxed", "gsm8k", "tag"])
def test_the_form_of_the_answer_is_a_setting(form: Literal["boxed", "gsm8k", "tag"]) -> None:
    completions = {"boxed": r"\boxed{5}", "gsm8k": "#### 5", "tag": "<answer>5</answer>"}
    grader = Grader(VerifierSpec(answer=form))
    for written, completion in completions.items():
        expected = "match" if written == form else "no_answer"
        assert grader.grade(completion, "5").reason == expected


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>a</think> <answer>b</answer>", 1.0),
        ("\n<think>a</think>\n\n<answer>b</answer>\n", 1.0),
        ("well <think>a</think> <answer>b</answer>", 0.5),
        ("<think>a</think> so <answer>b</answer>", 0.5),
        ("<think>a</think> <answer>b</answer> done", 0.5),
        ("<think></think> <answer>b</answer>", 0.5),
        ("<think>a</think> <answer> </answer>", 0.5),
        ("<answer>b</answer> <think>a</think>", 0.25),
        ("<think>a <answer>b</answer></think>", 0.25),
        ("<think>a</think>", 0.25),
        ("<answer>b</answer>", 0.25),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", 0.25),
        ("<think>a <answer>b", 0.0),
        ("</think>a<think>", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_reward_has_four_steps(completion: str, value: float) -> None:
    assert think_answer_format(completion) == value


def test_a_think_tag_that_the_prompt_opened_counts() -> None:
    assert think_answer_format("a</think> <answer>b</answer>", prompt="Q\n<think>\n") == 1.0
    assert think_answer_format("a</think> <answer>b</answer>", prompt="Q") == 0.25


def test_the_format_reward_is_a_part_beside_the_answer() -> None:
    grader = Grader(VerifierSpec(format_reward="think_answer"))
    right = grader.grade("<think>x</think> <answer>5</answer>", "5")
    assert (right.reward, right.parts) == (2.0, {"answer": 1.0, "format": 1.0})
    wrong = grader.grade("ok <think>x</think> <answer>4</answer>", "5")
    assert (wrong.verdict, wrong.reward, wrong.parts) == (Verdict.WRONG, 0.5, {"answer": 0.0, "format": 0.5})


@pytest.mark.parametrize(
    ("completion", "verdict", "reward", "reason", "detail"),
    [
        ("the 5", Verdict.CORRECT, 1.0, "reward", ""),
        ("the 4", Verdict.WRONG, 0.0, "reward", ""),
        ("parts", Verdict.CORRECT, 0.75, "reward", ""),
        ("nan", Verdict.ERROR, None, "reward_not_finite", "the reward function returned nan for 'reward'"),
        ("infinite", Verdict.ERROR, None, "reward_not_finite", "do not have a finite sum"),
        ("text", Verdict.ERROR, None, "reward_type", "got str for 'reward'"),
        ("none", Verdict.ERROR, None, "reward_type", "got NoneType for 'reward'"),
        ("empty", Verdict.ERROR, None, "reward_type", "empty dict"),
        ("raise too few digits", Verdict.ERROR, None, "crash", "ValueError: too few digits (misbehaving.py:"),
        ("quit", Verdict.ERROR, None, "crash", "SystemExit: 0 (misbehaving.py:"),
    ],
)
def test_a_reward_function_is_taken_at_its_word(
    misbehaving: str, completion: str, verdict: Verdict, reward: float | None, reason: str, detail: str
) -> None:
    grading = Grader(VerifierSpec(reward=misbehaving)).grade(completion, "5")
    assert (grading.verdict, grading.reward, grading.reason) == (verdict, reward, reason)
    assert detail in grading.detail


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "cannot import module 'no_such_module_here'"),
        ("broken_reward:f", "cannot import module 'broken_reward' .*no_such_module_here"),
        ("misbehaving:nothing", "has no function 'nothing'"),
        ("misbehaving:not_a_function", "has no function 'not_a_function'"),
        ("misbehaving:takes_nothing", "must take completion=, gold= and prompt="),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_refused_with_the_reason(
    misbehaving: str, path: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Grader(VerifierSpec(reward=path))


def test_every_gsm8k_solution_is_correct_against_itself(shared: Path, grader: Grader) -> None:
    rows = [
        json.loads(line)["answer"]
        for split in ("train", "test")
        for line in (shared / "data" / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8792
    for solution in rows:
        gold = extract_answer(solution, "gsm8k")
        assert gold is not None
        assert grader.gold_is_usable(gold), gold
        assert grader.grade(solution, gold).verdict is Verdict.CORRECT, gold
        assert grader.grade(solution, solution).verdict is Verdict.CORRECT, gold


def test_every_gsm8k_answer_is_wrong_against_the_next_different_one(shared: Path, grader: Grader) -> None:
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    golds = [float(solution.rpartition("#### ")[2].replace(",", "")) for solution in solutions]
    for this, (value, following) in enumerate(pairwise(golds)):
        expected = Verdict.CORRECT if value == following else Verdict.WRONG
        assert grader.grade(solutions[this], solutions[this + 1]).verdict is expected


def test_a_part_named_format_is_refused_where_the_format_reward_would_overwrite_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "formatted_reward.py").write_text(
        "def score(*, completion, gold, prompt): return {'answer': 1.0, 'format': -3.0}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    alone = Grader(VerifierSpec(reward="formatted_reward:score")).grade("x", "x")
    assert (alone.reward, alone.parts) == (-2.0, {"answer": 1.0, "format": -3.0})
    both = Grader(VerifierSpec(reward="formatted_reward:score", format_reward="think_answer")).grade("x", "x")
    assert (both.verdict, both.reward, both.reason) == (Verdict.ERROR, None, "reward_part_taken")
    assert "name it otherwise, or set verifier.format_reward: none" in both.detail
