"""What is the matter with a run: a pure function of what its driver wrote down. Used by the service and the command."""

from sapo_ray.diagnosis.diagnose import Evidence, diagnose

__all__ = ["Evidence", "diagnose"]
