"""The mathematics: gates, losses, advantages, corrections, token log-probs, diagnostics."""
