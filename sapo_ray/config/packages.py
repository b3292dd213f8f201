"""What only some jobs need, packages and secrets: whether this machine has them, asked before anything starts."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError


def missing_packages(spec: JobSpec) -> list[str]:
    """A sentence for each setting whose package is not installed here."""
    needed = {"logging.wandb_project": (spec.logging.wandb_project, "wandb")}
    needed["logging.mlflow_uri"] = (spec.logging.mlflow_uri, "mlflow")
    return [
        f"{key} is set but {package} is not installed: pip install {package}, or remove the key"
        for key, (value, package) in needed.items()
        if value is not None and not _importable(package)
    ]


def check_packages(spec: JobSpec) -> JobSpec:
    """The job itself; raises ConfigError if it needs a package that is not installed."""
    if missing := missing_packages(spec):
        raise ConfigError("\n".join(missing))
    return spec


def check_secrets(spec: JobSpec) -> None:
    """Where no service hands them over. Raises ConfigError unless every secret of the job is set in the environment."""
    missing = [name for name in spec.secrets if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"secrets: {', '.join(missing)} must be set in the environment, as no service hands secrets over here; "
            f"e.g. export {missing[0]}=..., or remove the name from secrets"
        )


def _importable(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return find_spec(package) is not None
