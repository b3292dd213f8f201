"""Models: loading, and the tiny ones that are made on the spot."""
