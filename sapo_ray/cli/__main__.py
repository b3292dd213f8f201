"""`python -m sapo_ray.cli`."""

from sapo_ray.cli import main

main()
