"""How many rollout workers to ask for, where not all of the three numbers are given."""

from __future__ import annotations

from sapo_ray.api.jobs import Scale


def scaled(now: Scale, target: int | None, least: int | None, most: int | None) -> dict[str, int]:
    """What is sent to change `now`: what is given as it is, what is not as near to `now` as that allows."""
    low = now.min if least is None else least
    high = now.max if most is None else most
    wanted = now.target if target is None else target
    if target is None and least is not None:
        wanted = max(wanted, least)
    if target is None and most is not None:
        wanted = min(wanted, most)
    return {
        "min": min(low, wanted) if least is None else low,
        "max": max(high, wanted) if most is None else high,
        "target": wanted,
    }
