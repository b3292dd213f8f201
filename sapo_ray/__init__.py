"""Reinforcement learning of language models that never loses a sample."""

__version__ = "0.1.0"
