"""References that cannot be graded against, and reward functions that cannot be used: found before a job starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sapo_ray.config.spec import VerifierSpec
from sapo_ray.verifier.child import GradingProcess
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


def check_reward(spec: VerifierSpec) -> None:
    """Start and end one grading process, in which `verifier.reward` is imported, away from this process.

    Raises as GradingProcess.launch: ConfigError where there is no such module or function, or it cannot be called.
    """

    async def start_and_end() -> None:
        process = await GradingProcess.launch(spec)
        process.kill()
        await process.reap()

    asyncio.run(start_and_end())
