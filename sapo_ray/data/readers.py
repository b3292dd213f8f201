"""Rows out of files, folders and data sets of `datasets`; every error says which file and line, and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sapo_ray.errors import DataError

Record = Mapping[str, Any]
_BATCH = 1024
_FILE_KINDS = (".jsonl", ".parquet")


def read_file(path: Path, fields: Iterable[str]) -> Iterator[tuple[str, Record]]:
    """Yield (place, row) of a JSONL or Parquet file; the place is `file:line`, or `file row n` counted from 0.

    Of a Parquet file only the columns that `fields` lie in are read.
    """
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, fields)
    raise DataError(
        f"{path}: files must be .jsonl or .parquet, got {path.suffix or 'no suffix'!r}; convert or rename it"
    )


def read_folder(folder: Path, split: str, fields: Iterable[str]) -> Iterator[tuple[str, Record]]:
    """Yield (place, row) of a folder that `datasets` saved, or of its `<split>.jsonl` or `<split>.parquet`."""
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return _read_saved(folder, split, fields)
    files = [folder / f"{split}{suffix}" for suffix in _FILE_KINDS]
    found = [file for file in files if file.is_file()]
    if len(found) == 1:
        return read_file(found[0], fields)
    if found:
        raise DataError(f"{folder}: both {files[0].name} and {files[1].name} are there; name the file that you mean")
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise DataError(
        f"{folder}: no {files[0].name} or {files[1].name}, and no data set saved by `datasets`; there is: {there}; "
        "set split to one of the files, or name a file"
    )


def read_hub(path: str, config: str | None, split: str, fields: Iterable[str]) -> Iterator[tuple[str, Record]]:
    """Yield (place, row) of a data set on the Hugging Face Hub, through the cache of `datasets`."""
    import datasets

    what = f"{path!r} (config {config!r}, split {split!r})"
    try:
        dataset = datasets.load_dataset(path, config, split=split)
    except Exception as error:
        # datasets raises its own, the Hub client's, HTTP and system errors, depending on where it failed.
        raise DataError(
            f"{what}: no such file or folder here, and the Hugging Face Hub did not give it ({_first_line(error)}); "
            "check id, config and split, or load it where there is a network, save it with save_to_disk(folder), "
            "and give that folder"
        ) from error
    return _rows_of(dataset, what, fields)


def missing_field(place: str, field: str, there: Iterable[str]) -> DataError:
    """The error for a row without a field it should have."""
    return DataError(
        f"{place}: no field {field!r}; the fields there are: {', '.join(sorted(map(str, there))) or 'none'}; "
        "set prompt_field and answer_field of the source to the fields that hold question and answer"
    )


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                place = f"{path}:{number}"
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield place, _parse_line(raw.rstrip(b"\r\n"), place)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _parse_line(raw: bytes, place: str) -> Record:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not valid UTF-8 at byte {error.start + 1} of the line (0x{raw[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not valid JSON at column {error.colno} ({error.msg}); each line must be one JSON object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not readable as JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: each line must be a JSON object, got {_kind(record)}")
    return record


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")


def _read_parquet(path: Path, fields: Iterable[str]) -> Iterator[tuple[str, Record]]:
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, fields, f"{path} row 0")
            row = 0
            for batch in file.iter_batches(_BATCH, columns=columns):
                for record in batch.to_pylist():
                    yield f"{path} row {row}", record
                    row += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({_first_line(error)}); write the file again") from error


def _read_saved(folder: Path, split: str, fields: Iterable[str]) -> Iterator[tuple[str, Record]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:
        # datasets raises system, Arrow, JSON and its own errors for damaged folders.
        raise DataError(
            f"{folder}: cannot be read as a data set of `datasets` ({_first_line(error)}); save it again"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{folder}: no split {split!r}; the splits there are: {', '.join(sorted(dataset))}")
        dataset = dataset[split]
    return _rows_of(dataset, str(folder), fields)


def _rows_of(dataset: Any, origin: str, fields: Iterable[str]) -> Iterator[tuple[str, Record]]:
    columns = _columns(dataset.column_names, fields, f"{origin} row 0")
    row = 0
    for batch in dataset.select_columns(columns).with_format("arrow").iter(_BATCH):
        for record in batch.to_pylist():
            yield f"{origin} row {row}", record
            row += 1


def _columns(names: list[str], fields: Iterable[str], place: str) -> list[str]:
    """The columns that the fields lie in; `a.b` is a column of that name, or field b of column a."""
    columns = []
    for field in fields:
        column = field if field in names else field.partition(".")[0]
        if column not in names:
            raise missing_field(place, field, names)
        if column not in columns:
            columns.append(column)
    return columns


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
