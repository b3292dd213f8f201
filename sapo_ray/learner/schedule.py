"""Learning rate as a function of the update number alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from sapo_ray.config.spec import JobSpec


def learning_rate(update: int, spec: JobSpec) -> float:
    """Learning rate of update number `update` (from 0) of steps x mini_batches x epochs.

    Linear warm-up reaches learner.lr at update `warmup_updates`; from there on constant, or linear or half a cosine
    down to lr x lr_end, which the update after the last would have.
    """
    learner = spec.learner
    total = spec.steps * spec.updates_per_step
    if update < learner.warmup_updates:
        return learner.lr * (update + 1) / (learner.warmup_updates + 1)
    if learner.schedule == "constant":
        return learner.lr
    done = min(1.0, (update - learner.warmup_updates) / max(1, total - learner.warmup_updates))
    left = 1.0 - done if learner.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return learner.lr * (learner.lr_end + (1.0 - learner.lr_end) * left)
