"""Sampling: vLLM engines in actors, and the pool of them."""
