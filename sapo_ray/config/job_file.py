"""A job as somebody wrote it: YAML to a mapping, before presets, defaults and checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapo_ray.config import yaml_text
from sapo_ray.errors import ConfigError


def read_job(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, empty, not YAML, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a job file, e.g. configs/quickstart.yaml") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the path of a job file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a job file is YAML") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    job = yaml_text.parse(text, str(path))
    if job is None:
        raise ConfigError(f"{path} is empty; the smallest job is `preset: quickstart`")
    if not isinstance(job, Mapping):
        kind = "list" if isinstance(job, list) else f"single value ({str(job)[:40]!r})"
        raise ConfigError(f"{path} must hold `key: value` lines, got a {kind}; see docs/jobs.md")
    return dict(job)
