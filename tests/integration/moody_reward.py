"""A reward function whose mood a test sets while it is used, by the file MOODY_REWARD: seconds to sleep, or `raise`."""

import os
import time
from pathlib import Path


def digits(completion: str, gold: str, prompt: str) -> float:
    """Share of digits in the completion."""
    mood = Path(os.environ["MOODY_REWARD"]).read_text()
    if mood == "raise":
        raise ValueError("this reward function was told to raise")
    time.sleep(float(mood))
    return sum(character.isdigit() for character in completion) / max(len(completion), 1)
