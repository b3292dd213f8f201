"""Rewards beside the answer: the format of the completion, and functions of one's own."""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

from sapo_ray.errors import ConfigError

RewardFunction = Callable[..., Any]


class BadReward(Exception):
    """A reward function returned something that is not a reward."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def think_answer_format(completion: str, prompt: str = "") -> float:
    """Format reward for `<think>...</think> <answer>...</answer>`, in {0, 0.25, 0.5, 1}.

    The values are those of the study (2602.19345); it does not give the rule, so the rule is ours:

        1.0   both blocks, in this order, neither empty, and nothing but white space around and between them
        0.5   both blocks in this order, but other text around or between them, or one of them empty
        0.25  one of the two blocks
        0.0   neither

    A block counts if each of its two tags occurs exactly once, in order. Where the prompt already ends with
    `<think>`, as some chat templates do, that tag is taken as part of the completion.
    """
    if prompt.rstrip().endswith("<think>"):
        completion = "<think>" + completion
    think, answer = _block(completion, "think"), _block(completion, "answer")
    if think is None or answer is None or think[1] > answer[0]:
        return 0.25 if think is not None or answer is not None else 0.0
    outside = completion[: think[0]] + completion[think[1] : answer[0]] + completion[answer[1] :]
    full = all(
        completion[block[0] + len(f"<{tag}>") : block[1] - len(f"</{tag}>")].strip()
        for block, tag in ((think, "think"), (answer, "answer"))
    )
    return 1.0 if full and not outside.strip() else 0.5


def _block(text: str, tag: str) -> tuple[int, int] | None:
    """[start, end) of `<tag>...</tag>`, tags included, if each tag occurs exactly once and in order."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening), text.index(closing)
    return (start, end + len(closing)) if start < end else None


def load_reward(path: str) -> RewardFunction:
    """The function that `verifier.reward: module:function` names.

    Raises:
        ConfigError: no such module or function, or it does not take completion=, gold= and prompt=.
    """
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except MemoryError:
        raise
    except BaseException as error:
        raise ConfigError(
            f"verifier.reward: cannot import module {module_name!r} ({type(error).__name__}: {error}); "
            "it must be importable on every node: install it, or put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"verifier.reward: module {module_name!r} has no function {function_name!r}")
    try:
        inspect.signature(function).bind(completion="", gold="", prompt="")
    except TypeError as error:
        raise ConfigError(
            f"verifier.reward: {path} must take completion=, gold= and prompt= ({error}); "
            "write def f(*, completion, gold, prompt)"
        ) from error
    except ValueError:
        pass  # a builtin without a signature: its first call will tell
    return function  # type: ignore[no-any-return]


def reward_parts(value: object) -> dict[str, float]:
    """Named summands of what a reward function returned; a bare number is the part `reward`.

    Raises:
        BadReward: not a number or a mapping of text to numbers (`reward_type`), or not finite (`reward_not_finite`).
    """
    returned: dict[object, object] = value if isinstance(value, dict) else {"reward": value}
    if not returned:
        raise BadReward("reward_type", "the reward function returned an empty dict; return at least one part")
    parts: dict[str, float] = {}
    for name, number in returned.items():
        if not isinstance(name, str) or not isinstance(number, numbers.Real):
            raise BadReward(
                "reward_type",
                "the reward function must return a number or a dict of text to numbers, "
                f"got {type(number).__name__} for {str(name)[:50]!r}",
            )
        parts[name] = float(number)
        if not math.isfinite(parts[name]):
            raise BadReward("reward_not_finite", f"the reward function returned {parts[name]} for {name[:50]!r}")
    if not math.isfinite(sum(parts.values())):
        raise BadReward("reward_not_finite", "the parts that the reward function returned do not have a finite sum")
    return parts
