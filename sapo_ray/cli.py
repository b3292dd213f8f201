"""Command line of sapo-ray."""

import typer

app = typer.Typer(no_args_is_help=True, help="Train language models by reinforcement learning; never lose a sample.")


def main() -> None:
    """Entry point of the `sapo-ray` command."""
    app()
