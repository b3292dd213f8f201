"""Command line of sapo-ray; `main.py` shows which commands there are."""

from sapo_ray.cli.main import app, main

__all__ = ["app", "main"]
