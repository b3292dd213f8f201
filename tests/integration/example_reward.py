"""A user's own reward: gives a model that was never trained something to learn."""

import os
import time

PAUSE_S = float(os.environ.get("EXAMPLE_REWARD_PAUSE_S", "0"))


def digits(completion: str, gold: str, prompt: str) -> float:
    """Share of digits in the completion."""
    time.sleep(PAUSE_S)
    return sum(character.isdigit() for character in completion) / max(len(completion), 1)
