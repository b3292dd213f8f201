"""References that cannot be graded against, found before a job starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.verifier.supervisor import GradingProcesses


async def find_unusable_golds(answers: Sequence[str], spec: VerifierSpec) -> list[int]:
    """Indices, ascending, of references that do not parse (or not within the deadline).

    Empty where `verifier.reward` is set: that function reads references by itself. Raises as GradingProcesses.start.
    """
    if spec.reward is not None or not answers:
        return []
    distinct = list(dict.fromkeys(answers))
    processes = GradingProcesses(spec)
    await processes.start()
    try:
        usable = dict(zip(distinct, await processes.usable_golds(distinct), strict=True))
    finally:
        await processes.close()
    return [row for row, answer in enumerate(answers) if not usable[answer]]


def check_gold(answers: Sequence[str], spec: VerifierSpec | None = None) -> list[int]:
    """`find_unusable_golds` for callers without an event loop."""
    return asyncio.run(find_unusable_golds(answers, spec or VerifierSpec()))
