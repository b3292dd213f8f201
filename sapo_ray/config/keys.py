"""Every key a job file may hold, read off JobSpec: for error messages, overrides and the reference page."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from sapo_ray.config.spec import JobSpec, Section

Location = Sequence[str | int]
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One setting."""

    name: str
    """Dotted; `[]` follows a list, e.g. `data.train[].path`."""
    kind: str
    """Type in words, e.g. `whole number` or `sigmoid, erf or clip`."""
    choices: tuple[str, ...]
    """What a key of fixed choices takes; empty for others."""
    bounds: str
    """Range in words, e.g. `>= 1`; empty if unbounded."""
    nullable: bool
    text: bool
    """Takes any text as it stands."""
    required: bool
    default: str
    """As YAML writes it; empty if required."""
    doc: str


def item_section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a field holds, if any, and whether it holds a list of them."""
    if get_origin(annotation) is list:
        return item_section(get_args(annotation)[0])[0], True
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return (annotation if is_section else None), False


def pattern(location: Location) -> str:
    """Name of the key at a concrete place: ("data", "train", 0, "path") is `data.train[].path`."""
    name = ""
    for part in location:
        name += "[]" if isinstance(part, int) or part.isdigit() else f".{part}" if name else part
    return name


def dotted(location: Location) -> str:
    """A concrete place as a user writes it: `data.train.0.path`."""
    return ".".join(str(part) for part in location)


@lru_cache(maxsize=1)
def all_keys() -> dict[str, Key]:
    """All leaf keys by name, in the order of the model."""
    return {key.name: key for key in _walk(JobSpec, "")}


def key_at(location: Location) -> Key | None:
    """The leaf key at a place (an entry of a list of numbers counts as its key); None for sections and the unknown."""
    name = pattern(location)
    return all_keys().get(name) or all_keys().get(name.removesuffix("[]"))


def names_at(location: Location) -> list[str]:
    """Names that may stand in the section at a place; empty if no section is there."""
    section: type[Section] | None = JobSpec
    for part in location:
        if section is None:
            return []
        if isinstance(part, int) or part.isdigit():
            continue
        found = section.model_fields.get(part)
        section = item_section(found.annotation)[0] if found else None
    return list(section.model_fields) if section else []


def _walk(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, found in section.model_fields.items():
        inner, is_list = item_section(found.annotation)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}{'[]' if is_list else ''}.")
        else:
            yield _key(f"{prefix}{name}", found)


def _key(name: str, found: FieldInfo) -> Key:
    members, nullable, bounds = _members(found.annotation, list(found.metadata))
    choices = tuple(str(c) for m in members if get_origin(m) is Literal for c in get_args(m))
    return Key(
        name=name,
        kind=_words(members, choices),
        choices=choices,
        bounds=_bounds(bounds),
        nullable=nullable,
        text=members == [str],
        required=found.is_required(),
        default="" if found.is_required() else _as_yaml(found.get_default(call_default_factory=True)),
        doc=" ".join((found.description or "").split()),
    )


def _members(annotation: Any, metadata: list[Any]) -> tuple[list[Any], bool, list[Any]]:
    """Alternatives of a union without None, whether None was among them, and all constraints."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _members(inner, metadata + [m for one in more for m in getattr(one, "metadata", [one])])
    if get_origin(annotation) in (Union, types.UnionType):
        members: list[Any] = []
        for alternative in get_args(annotation):
            if alternative is not type(None):
                found, _, metadata = _members(alternative, metadata)
                members += found
        return members, type(None) in get_args(annotation), metadata
    if get_origin(annotation) is tuple:
        return [annotation], False, metadata + _members(get_args(annotation)[0], [])[2]
    return [annotation], False, metadata


def _words(members: list[Any], choices: tuple[str, ...]) -> str:
    if choices:
        return choices[0] if len(choices) == 1 else ", ".join(choices[:-1]) + " or " + choices[-1]
    if get_origin(members[0]) is tuple:
        return f"list of {len(get_args(members[0]))} numbers"
    if get_origin(members[0]) is list:
        return "list of texts"
    return _WORDS[members[0]]


def _bounds(metadata: list[Any]) -> str:
    signs = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}
    attribute = {">=": "ge", ">": "gt", "<=": "le", "<": "lt"}
    parts = [f"{signs[type(m)]} {getattr(m, attribute[signs[type(m)]])}" for m in metadata if type(m) in signs]
    return ", ".join(parts)


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
