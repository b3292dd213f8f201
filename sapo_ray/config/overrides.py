"""`--set a.b=c`: values that go over a job file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from sapo_ray.config import yaml_text
from sapo_ray.config.keys import dotted, key_at
from sapo_ray.errors import ConfigError

Override = tuple[tuple[str, ...], Any]
"""A key's parts and its value."""


def parse_overrides(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Split each `key=value` and read its value: text keys take the text as it stands, all others YAML.

    Returns what could be read, and a sentence for each override that could not.
    """
    parsed: list[Override] = []
    problems: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        location = tuple(part.strip() for part in name.split("."))
        if not equals or not all(location):
            problems.append(f"--set {override!r} is not of the form key=value; write e.g. --set rollout.workers=4")
            continue
        try:
            parsed.append((location, _value(location, text)))
        except ConfigError as error:
            problems.append(str(error))
    return parsed, problems


def apply_overrides(job: Mapping[str, Any], parsed: Sequence[Override]) -> tuple[dict[str, Any], list[str]]:
    """A copy of `job` with the values set; sections that are missing are made, a list grows by one at its end.

    Returns it with a sentence for each override whose way leads through a value, or beyond a list.
    """
    result: dict[str, Any] = copy.deepcopy(dict(job))
    problems: list[str] = []
    for location, value in parsed:
        try:
            _set(result, location, value)
        except ConfigError as error:
            problems.append(str(error))
    return result, problems


def _value(location: tuple[str, ...], text: str) -> Any:
    key = key_at(location)
    if key is not None and key.text:
        bare = text.strip()
        if key.nullable and bare in ("", "null", "~"):
            return None
        quoted = len(bare) >= 2 and bare[0] == bare[-1] and bare[0] in "'\""
        return yaml_text.parse(bare, f"--set {dotted(location)}") if quoted else text
    return yaml_text.parse(text, f"--set {dotted(location)}={text}")


def _set(job: dict[str, Any], location: tuple[str, ...], value: Any) -> None:
    here: Any = job
    for depth, part in enumerate(location):
        last = depth == len(location) - 1
        following: list[Any] | dict[str, Any] = [] if not last and location[depth + 1].isdigit() else {}
        if isinstance(here, list):
            index = _index(here, location, depth)
            if index == len(here):
                here.append(following)
            if last:
                here[index] = value
            here = here[index]
        elif isinstance(here, dict):
            if last:
                here[part] = value
            elif here.get(part) is None:
                here[part] = following
            here = here[part]
        else:
            raise ConfigError(f"--set {dotted(location)}: {dotted(location[:depth])} is {here!r}, not a section")


def _index(here: list[Any], location: tuple[str, ...], depth: int) -> int:
    part = location[depth]
    if not part.isdigit() or int(part) > len(here):
        raise ConfigError(
            f"--set {dotted(location)}: {dotted(location[:depth])} is a list of {len(here)}; "
            f"after it comes a number from 0 to {len(here)} ({len(here)} adds an entry), got {part!r}"
        )
    return int(part)
