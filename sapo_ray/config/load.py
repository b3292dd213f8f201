"""From a job file to a JobSpec: YAML, then preset beneath it, then `--set` over it, then every check at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sapo_ray.config import yaml_text
from sapo_ray.config.job_file import read_job
from sapo_ray.config.keys import dotted, names_at
from sapo_ray.config.overrides import apply_overrides, parse_overrides
from sapo_ray.config.packages import check_packages
from sapo_ray.config.problems import MOST_PROBLEMS, describe
from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import ConfigError

SCALING = (
    "rollout.workers",
    "rollout.min_workers",
    "rollout.max_workers",
    "rollout.drain_timeout_s",
    "rollout.autoscale",
    "rollout.autoscale_wait",
    "rollout.autoscale_steps",
)
RESUMABLE = ("steps", *SCALING, "checkpoint", "evaluation", "logging", "deadlines", "guard", "secrets", "output")
"""Keys and sections that a resumed run may change; all else would make it another run."""


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The job in a YAML file, with `key=value` overrides over it, to be run on this machine.

    Raises:
        ConfigError: the file is missing, empty or not YAML, or the job is wrong; the message lists all problems. Or it
            needs a package that is not installed.
    """
    return check_packages(resolve(read_job(path), overrides, source=str(path)))


def resolve(job: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "job") -> JobSpec:
    """Check a job given as a mapping; what `load_job` does after reading. `source` names it in errors.

    Raises:
        ConfigError: lists all problems, each with key, value, bound and remedy.
    """
    merged, problems, known = _layered(job, overrides)
    name = merged.get("preset")
    try:
        spec = JobSpec.model_validate(merged)
    except ValidationError as error:
        problems += describe(error, ignore_missing=name is not None and not known)
    if not problems:
        return spec
    count = len(problems) if len(problems) <= MOST_PROBLEMS else f"more than {MOST_PROBLEMS}"
    heading = f"{source}: " if len(problems) == 1 else f"{source} has {count} problems:\n  - "
    raise ConfigError(heading + "\n  - ".join(problems))


def with_overrides(job: Mapping[str, Any], overrides: Sequence[str], *, source: str = "job") -> dict[str, Any]:
    """The job as it is handed to a service, which resolves and checks it: presets known here beneath the overrides.

    Raises:
        ConfigError: an override cannot be read, or leads through a value.
    """
    if not overrides:
        return dict(job)
    merged, problems, _ = _layered(job, overrides)
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return merged


def _layered(job: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str], bool]:
    """Preset, job, overrides, each over the one before; what is wrong with overrides; whether the preset is known."""
    parsed, problems = parse_overrides(overrides)
    name = {dotted(key): value for key, value in parsed}.get("preset", job.get("preset"))
    known = isinstance(name, str) and name in preset_names()
    merged, more = apply_overrides(_merge(_preset(str(name)), job) if known else job, parsed)
    return merged, problems + more, known


def preset_names() -> list[str]:
    """Presets that come with the package."""
    folder = resources.files("sapo_ray.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def to_json(spec: JobSpec) -> str:
    """The resolved job with every key, for storing with the run; `resolve(json.loads(...))` gives it back."""
    return json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def spec_hash(spec: JobSpec) -> str:
    """16 hex digits over all that a resume may not change (`run_dir` aside): which run a checkpoint belongs to."""
    fixed = {k: v for k, v in _leaves(spec).items() if not _resumable(k) and k not in ("preset", "run_dir")}
    return blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=8).hexdigest()


def changed_keys(old: JobSpec, new: JobSpec) -> list[str]:
    """Dotted keys that differ, in the order of the job; a list that grew or shrank counts as one key."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return list(_differences(before, after, ""))


def check_resume(old: JobSpec, new: JobSpec) -> list[str]:
    """The keys that a resumed run changes, to be journalled.

    Raises:
        ConfigError: a key changed that may not; names each, and the way out.
    """
    changed = changed_keys(old, new)
    refused = [key for key in changed if not _resumable(key)]
    if refused:
        allowed = ", ".join(map(resumable_name, RESUMABLE))
        raise ConfigError(
            f"a resumed run cannot change {', '.join(refused)}; it may change {allowed}. For anything else start a "
            "new job, with model.path set to the export/ folder of this run"
        )
    return changed


def resume_job(stored: Mapping[str, Any], overrides: Sequence[str]) -> tuple[JobSpec, list[str]]:
    """The stored job of a run with overrides over it, and the keys that they change.

    Raises:
        ConfigError: an override is wrong, or changes what a resume may not.
    """
    old = resolve(stored, source="stored job")
    new = check_packages(resolve(stored, overrides, source="resume"))
    return new, check_resume(old, new)


def _preset(name: str) -> dict[str, Any]:
    return copy.deepcopy(_parsed_preset(name))


@lru_cache(maxsize=8)
def _parsed_preset(name: str) -> dict[str, Any]:
    """Once a process: reading YAML is most of what checking a job costs."""
    text = (resources.files("sapo_ray.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    preset: dict[str, Any] = yaml_text.parse(text, f"preset {name}")
    return preset


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `base`, mapping by mapping; lists and values are replaced whole."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return result


def resumable_name(key: str) -> str:
    """As people are told of it: `steps`, `checkpoint.*`."""
    return f"{key}.*" if names_at(key.split(".")) else key


def _resumable(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in RESUMABLE)


def _leaves(spec: JobSpec) -> dict[str, Any]:
    """Top-level values and one level of sections by dotted key; enough to tell fixed keys from resumable ones."""
    leaves: dict[str, Any] = {}
    for section, values in spec.model_dump(mode="json").items():
        leaves |= {f"{section}.{k}": v for k, v in values.items()} if isinstance(values, dict) else {section: values}
    return leaves


def _differences(old: Any, new: Any, name: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [(str(k), old.get(k), new.get(k)) for k in old | new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [name]
    return [one for part, a, b in parts for one in _differences(a, b, f"{name}.{part}" if name else part)]
