"""Which sequences a canary is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sapo_ray.errors import DataError


def canary_sequences(prompts: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Token ids of prompts as canary sequences: of at least two tokens each, because the first has no log-prob.

    A single token is written twice: any fixed sequence serves, for learner and worker are asked about the same one.

    Raises
        DataError: no prompt has a token
    """
    sequences = tuple(tuple(int(token) for token in prompt) for prompt in prompts if len(prompt))
    if not sequences:
        raise DataError("weights are tested on prompts of the job, and those given for it have no tokens: see data")
    return tuple(sequence if len(sequence) > 1 else sequence * 2 for sequence in sequences)
