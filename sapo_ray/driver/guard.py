"""The guard of a run: generates less far ahead when samples get too far from the learner, and says what looks wrong.

    metrics of a step --> Guard --> batches ahead that are allowed now (Intake), conditions (journal)

    mismatch/kl or age/sample_mean beyond its bound   one batch ahead less, down to synchronous; the next look only
                                                      once what was generated before is used up. Condition Throttled
    all of them below RELAXED of their bounds         one batch ahead more again, after `patience` calm steps, which
                                                      doubles when that was too early; at the top Throttled is over
    mismatch/kl beyond its bound in synchronous mode  condition Mismatch: no staleness, so there is nothing to throttle
    largest ratio beyond its bound                    condition RatioOutOfRange
    reward of WINDOW steps far below its best         condition RewardCollapse

Alarms change nothing about training; each is said once and taken back when it is over. Pure: no clock, no journal.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from sapo_ray.config.spec import GuardSpec

RELAXED = 0.5
"""Between this share of a bound and the bound nothing changes."""
MOST_PATIENCE = 256
"""Calm steps before one batch ahead more, at most."""
WINDOW = 5
"""Steps that a reward is averaged over."""
NOISES = 3.0
"""A fall of the reward by less than so many times its usual change from step to step is noise."""

Conditions = list[dict[str, Any]]


class Guard:
    """One attempt's; a new attempt begins unthrottled."""

    def __init__(self, spec: GuardSpec, max_staleness: int) -> None:
        self._spec = spec
        self._most = self.ahead = max_staleness
        """Batches that generation may run ahead of training."""
        self._settled = 0
        """Before this step the last change has not shown its effect."""
        self._calm = 0
        self._patience = 2 * (max_staleness + 2)
        self._raised = -MOST_PATIENCE
        self._alarms: set[str] = set()
        self._rewards: deque[float] = deque(maxlen=WINDOW)
        self._changes: deque[float] = deque(maxlen=4 * WINDOW)
        self._best = -math.inf

    def look(self, step: int, metrics: Mapping[str, float]) -> Conditions:
        """Take the metrics of a step in; returns the conditions to report, `cleared` ones among them."""
        return [*self._throttle(step, metrics), *self._ratio(metrics), *self._reward(metrics)]

    def rewind(self, step: int) -> None:
        """The run goes on from `step` again. What is throttled stays so; what later steps showed is void."""
        self._settled = min(self._settled, step + self.ahead + 2)
        self._raised = min(self._raised, step)
        self._calm = 0
        self._best = -math.inf
        self._rewards.clear()

    # --- throttle --------------------------------------------------------------------------------------------------

    def _throttle(self, step: int, metrics: Mapping[str, float]) -> Conditions:
        measured = [
            ("mismatch/kl", "max_kl", metrics.get("mismatch/kl"), self._spec.max_kl),
            ("age/sample_mean", "max_age", metrics.get("age/sample_mean"), self._spec.max_age),
        ]
        known = [(name, key, value, bound) for name, key, value, bound in measured if value is not None and bound]
        beyond = [f"{name} {value:.3g} > guard.{key} {bound:g}" for name, key, value, bound in known if value > bound]
        self._calm = self._calm + 1 if all(value <= RELAXED * bound for _, _, value, bound in known) else 0
        said = self._alarm("Mismatch", self._mismatch(beyond))
        if step < self._settled:
            return said
        if beyond and self.ahead > 0:
            if step - self._raised <= self._patience:
                self._patience = min(2 * self._patience, MOST_PATIENCE)
            return [*said, *self._change(step, self.ahead - 1, "; ".join(beyond))]
        if self._calm >= self._patience and self.ahead < self._most:
            self._raised = step
            return [*said, *self._change(step, self.ahead + 1, f"calm for {self._calm} steps")]
        return said

    def _mismatch(self, beyond: list[str]) -> str | None:
        if self.ahead > 0 or not any(text.startswith("mismatch") for text in beyond):
            return None
        return (
            f"{beyond[0]} in synchronous generation: sampler and learner disagree about the same weights; compare "
            "model.dtype and rollout.dtype, or lower learner.lr"
        )

    def _change(self, step: int, ahead: int, why: str) -> Conditions:
        self._settled = step + max(ahead, self.ahead) + 2
        self.ahead, self._calm = ahead, 0
        how = (
            "generation is synchronous"
            if ahead == 0
            else f"generation runs {ahead} {'batch' if ahead == 1 else 'batches'} ahead"
        )
        said = {"condition": "Throttled", "step": step, "reason": f"{why}: {how} (rollout.max_staleness {self._most})"}
        return [said | ({"cleared": True} if ahead == self._most else {})]

    # --- alarms ----------------------------------------------------------------------------------------------------

    def _ratio(self, metrics: Mapping[str, float]) -> Conditions:
        largest, bound = metrics.get("learner/log_ratio_max"), self._spec.max_ratio
        if largest is None or bound is None:
            return []
        ratio = math.exp(min(largest, 700.0))
        if ratio <= bound:
            return self._alarm("RatioOutOfRange", None)
        reason = f"a ratio of new to old policy was {ratio:.3g} (or its inverse), guard.max_ratio is {bound:g}"
        return self._alarm("RatioOutOfRange", f"{reason}; lower learner.lr, or learner.mini_batches x epochs")

    def _reward(self, metrics: Mapping[str, float]) -> Conditions:
        reward, drop = metrics.get("reward/mean"), self._spec.reward_drop
        if reward is None or drop is None or not math.isfinite(reward):
            return []
        if self._rewards:
            self._changes.append(abs(reward - self._rewards[-1]))
        self._rewards.append(reward)
        if len(self._rewards) < WINDOW:
            return []
        now = fmean(self._rewards)
        self._best = max(self._best, now)
        fall, least = self._best - now, drop * abs(self._best)
        if fall > max(least, NOISES * median(self._changes)):
            reason = (
                f"mean reward of {WINDOW} steps fell from {self._best:.3g} to {now:.3g} (guard.reward_drop {drop:g})"
            )
            return self._alarm("RewardCollapse", f"{reason}; consider an earlier checkpoint and a lower learner.lr")
        return self._alarm("RewardCollapse", None) if fall < RELAXED * least else []

    def _alarm(self, name: str, reason: str | None) -> Conditions:
        """Say it once when it begins, and once when it is over."""
        if reason is not None and name not in self._alarms:
            self._alarms.add(name)
            return [{"condition": name, "reason": reason}]
        if reason is None and name in self._alarms:
            self._alarms.remove(name)
            return [{"condition": name, "reason": "it is over", "cleared": True}]
        return []
