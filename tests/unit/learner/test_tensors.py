"""Rows as padded tensors: which column speaks of which token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sapo_ray.learner.batching import Row
from sapo_ray.learner.tensors import collate
from sapo_ray.types import CompletionPayload

CPU = torch.device("cpu")


def payload(prompt: list[int], completion: list[int]) -> CompletionPayload:
    return CompletionPayload(
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        token_ids=np.array(completion, dtype=np.int32),
        logprobs=-np.arange(1, len(completion) + 1, dtype=np.float32),
        text="",
    )


def row(slot: int, prompt: int, tokens: int, ages: tuple[tuple[int, int, int], ...] = ()) -> Row:
    return Row(
        slot=slot,
        id=("g", slot),
        group=3,
        prompt_tokens=prompt,
        tokens=tokens,
        advantage=0.5,
        weight=0.25,
        ages=ages or ((0, tokens, 0),),
    )


def test_columns_are_aligned_with_the_token_that_follows() -> None:
    payloads = [payload([7, 8], [11, 12, 13]), payload([9], [14])]
    batch = collate((row(0, 2, 3, ((0, 1, 2), (1, 3, 1))), row(1, 1, 1)), payloads, CPU)
    assert batch.input_ids.tolist() == [[7, 8, 11, 12, 13], [9, 14, 0, 0, 0]]
    assert batch.mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert batch.rollout_logp.tolist() == [[0, -1, -2, -3], [-1, 0, 0, 0]]
    assert batch.ages.tolist() == [[0, 2, 1, 1], [0, 0, 0, 0]]
    assert torch.equal(batch.selected, batch.mask)
    assert batch.advantages.tolist() == [0.5, 0.5]
    assert batch.loss_weights.tolist() == [0.25, 0.25]
    assert batch.groups.tolist() == [3, 3]


def test_an_empty_micro_batch_computes_one_token_that_counts_for_nothing() -> None:
    batch = collate((), [], CPU)
    assert batch.input_ids.shape == (1, 2)
    assert batch.selected.tolist() == [[True]]
    assert batch.mask.tolist() == [[False]]
    assert batch.loss_weights.tolist() == [0.0]


def test_a_payload_that_is_not_the_promised_one_is_refused() -> None:
    with pytest.raises(AssertionError, match="'g', 0"):
        collate((row(0, 2, 3),), [payload([7, 8], [11, 12])], CPU)
