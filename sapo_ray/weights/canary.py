"""Which sequences a canary is made of."""

from __future__ import annotations

from collections.abc import Sequence

from sapo_ray.errors import DataError


def canary_sequences(prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Token ids of prompts as canary sequences: of at least two tokens each, because the first has no log-prob.

    A single token is written twice: any fixed sequence serves, for learner and worker are asked about the same one.
    Without prompts there is no canary, and no worker will take such weights.

    Raises
        DataError: prompts are given, but none has a token
    """
    sequences = tuple(tuple(int(token) for token in prompt) for prompt in prompts if len(prompt))
    if prompts and not sequences:
        raise DataError("weights are tested on prompts of the job, and those given for it have no tokens: see data")
    return tuple(sequence if len(sequence) > 1 else sequence * 2 for sequence in sequences)
