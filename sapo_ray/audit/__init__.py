"""An auditor of finished, paused, killed or running runs: see run.py."""

from sapo_ray.audit.findings import Finding, Report
from sapo_ray.audit.run import audit

__all__ = ["Finding", "Report", "audit"]
