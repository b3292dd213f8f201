"""Data sources: from a SourceSpec to questions and reference answers in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sapo_ray.config.spec import SourceSpec
from sapo_ray.data import addition
from sapo_ray.data.gold import extract_gold
from sapo_ray.data.readers import Record, missing_field, read_file, read_folder, read_hub
from sapo_ray.errors import ConfigError, DataError

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ADDITION_SPLITS = {"train": addition.train_pairs, "heldout": addition.heldout_pairs}
_TELLS_NOTHING = {"train", "test", "valid", "validation", "dev", "eval", "heldout", "data"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one source, in file order; three lists of one length."""

    name: str
    questions: list[str]
    golds: list[str]
    places: list[str]
    """Where each row stands, for error messages: `file:line`, or `file row n` counted from 0."""

    def __len__(self) -> int:
        return len(self.questions)


def load_rows(spec: SourceSpec) -> Rows:
    """Read the rows of a source (the first `limit` of them) with their reference answers extracted.

    Raises:
        DataError: nothing is there, a row is malformed, lacks a field or a reference answer, or there is no row.
        ConfigError: a setting does not fit the kind of source.
    """
    rows = Rows(name=source_name(spec), questions=[], golds=[], places=[])
    for place, record in islice(_records(spec), spec.limit):
        question = _text(record, spec.prompt_field, place)
        answer = _text(record, spec.answer_field, place)
        try:
            gold = extract_gold(answer, spec.gold)
        except ValueError as error:
            raise DataError(
                f"{place}: field {spec.answer_field!r}: {error}; gold is {spec.gold!r}: "
                "set gold of the source to where the reference stands, or mend the row"
            ) from None
        rows.questions.append(question)
        rows.golds.append(gold)
        rows.places.append(place)
    if not rows.questions:
        raise DataError(f"data source {spec.path!r}: no rows; a source must have at least one")
    return rows


def source_name(spec: SourceSpec) -> str:
    """Short name of a source: as given, else from its path (and its split, where that is not `train`)."""
    if spec.name is not None:
        if not _NAME.fullmatch(spec.name):
            raise ConfigError(f"name of data source must be letters, digits, dot, dash, underscore, got {spec.name!r}")
        return spec.name
    path = Path(spec.path).expanduser()
    if spec.path.startswith("builtin:"):
        name = spec.path.removeprefix("builtin:")
    elif path.suffix in (".jsonl", ".parquet") and not path.is_dir():
        told = path.stem.lower() not in _TELLS_NOTHING
        name = path.stem if told or not path.resolve().parent.name else f"{path.resolve().parent.name}-{path.stem}"
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    else:
        name = path.name or path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name if spec.split == "train" else f"{name}-{spec.split}")


def named_apart(specs: Sequence[SourceSpec], setting: str) -> list[str]:
    """Names of the sources.

    Raises:
        ConfigError: two have the same, so that their rows could not be told apart.
    """
    names = [source_name(spec) for spec in specs]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(
                f"{setting}: sources {specs[names.index(name)].path!r} and {specs[i].path!r} are both named {name!r}; "
                "give each a name of its own (`name:`)"
            )
    return names


def _records(spec: SourceSpec) -> Iterator[tuple[str, Record]]:
    fields = (spec.prompt_field, spec.answer_field)
    path = Path(spec.path).expanduser()
    if spec.path.startswith("builtin:"):
        return _builtin(spec)
    if spec.config is not None and path.exists():
        raise ConfigError(
            f"config {spec.config!r} belongs to data sets on the Hub, {spec.path!r} is local; remove it from the "
            "job, or give --set data.train.0.config=null (0 is the source's place in the list; "
            "evaluation.data.0.config=null in an evaluation)"
        )
    if path.is_dir():
        return read_folder(path, spec.split, fields)
    if path.exists():
        return read_file(path, fields)
    if not _HUB_ID.fullmatch(spec.path) or path.suffix in (".jsonl", ".parquet", ".json"):
        raise DataError(
            f"data source {spec.path!r}: no such file or folder (looked in {Path.cwd()}); give a .jsonl or .parquet "
            "file, a folder of such, a Hugging Face data set id, or builtin:addition"
        )
    return read_hub(spec.path, spec.config, spec.split, fields)


def _builtin(spec: SourceSpec) -> Iterator[tuple[str, Record]]:
    if spec.path != "builtin:addition":
        raise DataError(f"data source {spec.path!r} is not known; the builtin one is builtin:addition")
    if spec.split not in _ADDITION_SPLITS:
        raise DataError(f"builtin:addition has no split {spec.split!r}; it has {', '.join(_ADDITION_SPLITS)}")
    for row, (a, b) in enumerate(_ADDITION_SPLITS[spec.split]()):
        yield (
            f"builtin:addition {spec.split} row {row}",
            {"question": addition.prompt(a, b), "answer": addition.gold(a, b)},
        )


def _text(record: Record, field: str, place: str) -> str:
    """Text of a field; dots reach into nested mappings, numbers are written out."""
    value: object = record
    if field in record:
        value = record[field]
    else:
        for part in field.split("."):
            if not isinstance(value, dict) or part not in value:
                raise missing_field(place, field, value if isinstance(value, dict) else record)
            value = value[part]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{place}: field {field!r} must be text or a number, got {kind}; point the source at another")
    if not value.strip():
        raise DataError(f"{place}: field {field!r} is empty; mend or remove the row")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{place}: field {field!r} holds half of a surrogate pair, which is no text; mend the row")
    return value
