"""From a completion and its reference to a grading. Pure; runs in a grading process, never in the actor itself.

    completion -> answer as written -> plain form -> equal to the reference? -> Grading

Reasons of a verdict
    correct   match
    wrong     mismatch, no_answer (none found), unparseable (the answer, not the reference)
    error     gold_unparseable, too_long (the answer exceeds the cap), and of a reward function: crash (it raised),
              reward_type, reward_not_finite, reward_part_taken; from outside: timeout, died (the process
              ended over it, out of memory mostly), verifier_unavailable
    either    reward (the reward function's own word)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sapo_ray.config.sections import VerifierSpec
from sapo_ray.errors import ConfigError
from sapo_ray.types import Grading, Verdict
from sapo_ray.verifier.answers import OwnBoundExceeded, extract_answer
from sapo_ray.verifier.rewards import BadReward, load_reward, reward_parts, think_answer_format

if TYPE_CHECKING:
    from sapo_ray.verifier.equality import Comparer

# Of the part `answer`, or of the sum where there is none: from here on a reward function's word counts as correct.
CORRECT_FROM = 0.5
DETAIL_CHARS = 500


class Grader:
    """Grades completions one after the other under the settings of a job.

    Args:
        shortcuts: see Comparer.
        announce: see Comparer.

    Raises:
        ConfigError: `verifier.reward` cannot be loaded.
    """

    def __init__(
        self, spec: VerifierSpec, *, shortcuts: bool = True, announce: Callable[[str], None] | None = None
    ) -> None:
        self._spec = spec
        self._reward = None if spec.reward is None else load_reward(spec.reward)
        self._comparer = None if self._reward is not None else _comparer(spec, shortcuts, announce)

    def self_check(self) -> None:
        """Grades two known answers; also warms the parser up. Raises ConfigError if the machinery is broken."""
        if self._comparer is None:
            return
        half, four = self._comparer.gold("0.5"), self._comparer.gold("4")
        if self._comparer.equal(half, "\\frac{1}{2}") is not True or self._comparer.equal(four, "1+2") is not False:
            raise ConfigError("math-verify does not grade known answers right; reinstall math-verify==0.9.0")

    def gold_is_usable(self, gold: str) -> bool:
        """Does a reference parse? Always so for a reward function of one's own, which reads it by itself."""
        return self._comparer is None or self._comparer.is_usable(self._comparer.gold(gold))

    def grade(self, completion: str, gold: str, prompt: str = "") -> Grading:
        """One grading. Lets only MemoryError pass: the process that raises it is to be replaced."""
        started = time.perf_counter()
        parts: dict[str, float] = {}
        detail = ""
        try:
            if self._comparer is not None:
                verdict, reason = self._grade_answer(self._comparer, completion, gold)
                parts["answer"] = float(verdict is Verdict.CORRECT)
            else:
                assert self._reward is not None
                parts = reward_parts(self._reward(completion=completion, gold=gold, prompt=prompt))
                if "format" in parts and self._spec.format_reward != "none":
                    raise BadReward(
                        "reward_part_taken",
                        "the reward function returned a part `format`, which verifier.format_reward adds too; "
                        "name it otherwise, or set verifier.format_reward: none",
                    )
                correct = parts.get("answer", sum(parts.values())) >= CORRECT_FROM
                verdict, reason = Verdict.CORRECT if correct else Verdict.WRONG, "reward"
        except MemoryError:
            raise
        except BadReward as error:
            verdict, reason, detail = Verdict.ERROR, error.reason, str(error)
        except OwnBoundExceeded:
            verdict, reason = Verdict.ERROR, "timeout"
        except BaseException as error:  # noqa: BLE001 - whatever a reward function raises is its verdict on itself
            verdict, reason, detail = Verdict.ERROR, "crash", _where(error)
        if verdict is Verdict.ERROR:
            seconds = time.perf_counter() - started
            return Grading(verdict=verdict, reward=None, reason=reason, detail=detail[:DETAIL_CHARS], seconds=seconds)
        if self._spec.format_reward == "think_answer":
            parts["format"] = think_answer_format(completion, prompt)
        reward = sum(parts.values())
        return Grading(
            verdict=verdict, reward=reward, parts=parts, reason=reason, seconds=time.perf_counter() - started
        )

    def _grade_answer(self, comparer: Comparer, completion: str, gold_text: str) -> tuple[Verdict, str]:
        gold = comparer.gold(gold_text)
        if not comparer.is_usable(gold):
            return Verdict.ERROR, "gold_unparseable"
        answer = extract_answer(completion, self._spec.answer)
        if answer is None:
            return Verdict.WRONG, "no_answer"
        if len(answer) > self._spec.max_answer_chars:
            return Verdict.ERROR, "too_long"
        equal = comparer.equal(gold, answer)
        if equal is None:
            return Verdict.WRONG, "unparseable"
        return (Verdict.CORRECT, "match") if equal else (Verdict.WRONG, "mismatch")


def _comparer(spec: VerifierSpec, shortcuts: bool, announce: Callable[[str], None] | None) -> Comparer:
    # Here, because importing math-verify is most of a process's start, and a reward function may do without it.
    from sapo_ray.verifier.equality import Comparer

    # Whole seconds, and far enough beyond the parent's deadline that the parent decides even when it is late.
    own_bound = math.ceil(spec.deadline_s) * 2 + 60
    return Comparer(timeout_s=own_bound, max_chars=spec.max_answer_chars, shortcuts=shortcuts, announce=announce)


def _where(error: BaseException) -> str:
    """`ValueError: no digits (reward.py:12)`: what was raised and the innermost line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" ({trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno})"
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an exception whose text raises is still reported by its type
        text = "<no text>"
    return f"{type(error).__name__}: {text[:300]}{place}"
