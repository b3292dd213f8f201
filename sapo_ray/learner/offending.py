"""The batch that brought a job down, kept for whoever looks for the cause: JSON lines, one a sample, no pickles.

nonfinite/step-<step>-update-<update>-rank-<rank>.jsonl    in the run directory, one file a rank
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapo_ray.learner.batching import RankPlan, Row
from sapo_ray.types import CompletionPayload


def keep_offending(run_dir: Path, plan: RankPlan, update: int, payloads: Sequence[CompletionPayload], rank: int) -> str:
    """Write this rank's part of the mini-batch of an update; returns in words where it is, or why it is not there."""
    folder = run_dir / "nonfinite"
    lines = [
        json.dumps(_record(row, payloads[row.slot]), allow_nan=False)  # ASCII: texts come back as they were
        for rows in plan.mini_batches[plan.updates[update]]
        for row in rows
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"step-{plan.step:06d}-update-{update}-rank-{rank}.jsonl"
        file.write_text("".join(line + "\n" for line in lines), encoding="ascii")
    except OSError as error:  # the cause of the failure is what the user has to see
        return f"the offending batch could not be kept in {folder} ({error.strerror})"
    return f"the offending batch is kept in {folder}"


def _record(row: Row, payload: CompletionPayload) -> dict[str, Any]:
    """A number that is not finite, which JSON does not have, is a word: nan, inf or -inf."""
    return {
        "group_id": row.id[0],
        "sample_index": row.id[1],
        "advantage": _number(row.advantage),
        "loss_weight": _number(row.weight),
        "prompt_token_ids": payload.prompt_token_ids.tolist(),
        "token_ids": payload.token_ids.tolist(),
        "rollout_logprobs": [_number(value) for value in payload.logprobs.tolist()],
        "text": payload.text,
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
