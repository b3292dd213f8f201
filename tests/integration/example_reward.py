"""A user's own reward: gives a model that was never trained something to learn."""


def digits(completion: str, gold: str, prompt: str) -> float:
    """Share of digits in the completion."""
    return sum(character.isdigit() for character in completion) / max(len(completion), 1)
