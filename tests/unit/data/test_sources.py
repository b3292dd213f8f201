"""Rows from files, folders and data sets, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapo_ray.config.spec import SourceSpec
from sapo_ray.data.sources import load_rows, named_apart, source_name
from sapo_ray.errors import ConfigError, DataError

ROWS = [{"question": f"{n}+1?", "answer": f"#### {n + 1}", "id": n} for n in range(5)]


def _jsonl(path: Path, lines: list[str | bytes]) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def _spec(path: Path | str, **settings: object) -> SourceSpec:
    return SourceSpec.model_validate({"path": str(path), **settings})


def _as_jsonl(folder: Path) -> Path:
    return _jsonl(folder / "rows.jsonl", [json.dumps(row) for row in ROWS])


def _as_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=2)
    return folder / "rows.parquet"


def _as_folder_of_jsonl(folder: Path) -> Path:
    _as_jsonl(folder).rename(folder / "train.jsonl")
    return folder


def _as_folder_of_parquet(folder: Path) -> Path:
    _as_parquet(folder).rename(folder / "train.parquet")
    return folder


def _as_dataset(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def _as_dataset_of_splits(folder: Path) -> Path:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole.select([4])}).save_to_disk(str(folder / "splits"))
    return folder / "splits"


@pytest.mark.parametrize(
    "write",
    [_as_jsonl, _as_parquet, _as_folder_of_jsonl, _as_folder_of_parquet, _as_dataset, _as_dataset_of_splits],
)
def test_every_kind_of_source_gives_the_same_rows(write: Callable[[Path], Path], tmp_path: Path) -> None:
    spec = _spec(write(tmp_path))
    rows = load_rows(spec)
    assert rows.questions == ["0+1?", "1+1?", "2+1?", "3+1?", "4+1?"]
    assert rows.golds == ["1", "2", "3", "4", "5"]
    assert load_rows(spec.model_copy(update={"limit": 2})).golds == ["1", "2"]


def test_the_split_of_a_saved_data_set_is_the_one_asked_for(tmp_path: Path) -> None:
    folder = _as_dataset_of_splits(tmp_path)
    assert load_rows(_spec(folder, split="test")).golds == ["5"]
    with pytest.raises(DataError, match="no split 'dev'; the splits there are: test, train"):
        load_rows(_spec(folder, split="dev"))


def test_places_name_the_line_of_a_jsonl_file_and_the_row_of_a_parquet_file(tmp_path: Path) -> None:
    lines = _jsonl(tmp_path / "a.jsonl", [json.dumps(ROWS[0]), "", json.dumps(ROWS[1])])
    assert load_rows(_spec(lines)).places == [f"{lines}:1", f"{lines}:3"]
    assert load_rows(_spec(_as_parquet(tmp_path))).places[4] == f"{tmp_path}/rows.parquet row 4"


def test_fields_are_reached_into_by_dots_in_json_and_parquet(tmp_path: Path) -> None:
    nested = [{"task": {"text": "6*7?", "key": {"value": 42}}, "reward.gold": "no"}]
    lines = _jsonl(tmp_path / "a.jsonl", [json.dumps(nested[0])])
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "a.parquet")
    for file in (lines, tmp_path / "a.parquet"):
        rows = load_rows(_spec(file, prompt_field="task.text", answer_field="task.key.value"))
        assert (rows.questions, rows.golds) == (["6*7?"], ["42"])
        assert load_rows(_spec(file, prompt_field="task.text", answer_field="reward.gold")).golds == ["no"]
    with pytest.raises(DataError, match=r"no field 'task\.topic'; the fields there are: key, text"):
        load_rows(_spec(lines, prompt_field="task.topic"))


def test_gsm8k_has_7473_and_1319_rows_with_the_known_golds(shared: Path) -> None:
    train = load_rows(_spec(shared / "data" / "gsm8k"))
    test = load_rows(_spec(shared / "data" / "gsm8k" / "test.jsonl"))
    assert (len(train), len(test)) == (7473, 1319)
    assert train.golds[:5] == ["72", "10", "5", "42", "624"]
    assert test.golds[:3] == ["18", "3", "70000"]
    assert train.questions[0].startswith("Natalia sold clips to 48 of her friends in April")


def test_aime_is_read_by_its_own_field_name(shared: Path) -> None:
    file = shared / "data" / "aime24" / "test.jsonl"
    rows = load_rows(_spec(file, prompt_field="problem"))
    assert (len(rows), rows.golds[0]) == (30, "204")
    with pytest.raises(DataError) as raised:
        load_rows(_spec(file))
    assert str(raised.value) == (
        f"{file}:1: no field 'question'; the fields there are: answer, id, problem; "
        "set prompt_field and answer_field of the source to the fields that hold question and answer"
    )


def test_builtin_addition_has_two_splits() -> None:
    train, heldout = load_rows(_spec("builtin:addition")), load_rows(_spec("builtin:addition", split="heldout"))
    assert (len(train), len(heldout)) == (7588, 512)
    assert (heldout.questions[0], heldout.golds[0]) == ("22+13=", "35")
    with pytest.raises(DataError, match="no split 'test'; it has train, heldout"):
        load_rows(_spec("builtin:addition", split="test"))
    with pytest.raises(DataError, match="'builtin:sums' is not known; the builtin one is builtin:addition"):
        load_rows(_spec("builtin:sums"))


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"question": "x"'], ":2: not valid JSON at column 17 (Expecting ',' delimiter)"),
        ([GOOD, GOOD, "[1, 2]"], ":3: each line must be a JSON object, got a list"),
        (["null"], ":1: each line must be a JSON object, got null"),
        (
            [GOOD, b'{"question": "caf\xe9"}'],
            ":2: not valid UTF-8 at byte 18 of the line (0xe9); save the file as UTF-8",
        ),
        ([GOOD, '{"question": "x"}'], ":2: no field 'answer'; the fields there are: question"),
        (['{"question": null, "answer": "1"}'], ":1: field 'question' must be text or a number, got null"),
        (['{"question": ["x"], "answer": "1"}'], ":1: field 'question' must be text or a number, got list"),
        (['{"question": "x", "answer": true}'], ":1: field 'answer' must be text or a number, got bool"),
        (['{"question": " ", "answer": "1"}'], ":1: field 'question' is empty"),
        ([r'{"question": "\ud800", "answer": "1"}'], ":1: field 'question' holds half of a surrogate pair"),
        (["[" * 100_000], ":1: not "),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(lines: list[str | bytes], message: str, tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError, match=re.escape(f"{file}{message}")):
        load_rows(_spec(file))


def test_a_row_without_the_reference_asked_for_is_named(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", [GOOD, '{"question": "x", "answer": "seven"}'])
    with pytest.raises(DataError) as raised:
        load_rows(_spec(file, gold="gsm8k"))
    assert str(raised.value) == (
        f"{file}:2: field 'answer': an answer after `####` was expected, got 'seven'; gold is 'gsm8k': "
        "set gold of the source to where the reference stands, or mend the row"
    )


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n\r\n")
    assert load_rows(_spec(file)).golds == ["1", "1"]


def test_numbers_are_written_out(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", ['{"question": 7, "answer": 0.5}'])
    rows = load_rows(_spec(file))
    assert (rows.questions, rows.golds) == (["7"], ["0.5"])


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", [""])
    with pytest.raises(DataError, match="no rows; a source must have at least one"):
        load_rows(_spec(file))
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows; a source must have at least one"):
        load_rows(_spec(tmp_path / "a.parquet"))


def test_a_parquet_file_without_the_column_or_damaged_is_named(tmp_path: Path) -> None:
    file = _as_parquet(tmp_path)
    with pytest.raises(
        DataError, match=re.escape(f"{file} row 0: no field 'q'; the fields there are: answer, id, que")
    ):
        load_rows(_spec(file, prompt_field="q"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=re.escape(f"{file}: cannot be read as Parquet (ArrowInvalid")):
        load_rows(_spec(file))


def test_a_path_that_is_not_there_says_what_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder .*; give a \.jsonl or \.parquet file"):
        load_rows(_spec(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match=r"no such file or folder"):
        load_rows(_spec("data/missing.parquet"))
    file = tmp_path / "a.csv"
    file.write_text("question,answer\n")
    with pytest.raises(DataError, match=r"files must be \.jsonl or \.parquet, got '\.csv'"):
        load_rows(_spec(file))


def test_a_folder_without_the_split_says_what_is_there(tmp_path: Path) -> None:
    _as_folder_of_jsonl(tmp_path)
    with pytest.raises(DataError, match=r"no test\.jsonl or test\.parquet.*; there is: train\.jsonl"):
        load_rows(_spec(tmp_path, split="test"))
    _as_folder_of_parquet(tmp_path)
    with pytest.raises(DataError, match=r"both train\.jsonl and train\.parquet are there"):
        load_rows(_spec(tmp_path))


def test_a_damaged_saved_data_set_is_named(tmp_path: Path) -> None:
    folder = _as_dataset(tmp_path)
    next(folder.glob("*.arrow")).write_bytes(b"junk")
    with pytest.raises(DataError, match=re.escape(f"{folder}: cannot be read as a data set of `datasets`")):
        load_rows(_spec(folder))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_hub_data_set_that_cannot_be_reached_names_the_id_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as raised:
        load_rows(_spec("nobody/no-such-data", config="main", split="test"))
    text = str(raised.value)
    assert text.startswith("'nobody/no-such-data' (config 'main', split 'test'): no such file or folder here, and the")
    assert text.endswith("load it where there is a network, save it with save_to_disk(folder), and give that folder")


def test_config_belongs_to_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config 'main' belongs .* the Hub.*--set data.train.0.config=null"):
        load_rows(_spec(_as_jsonl(tmp_path), config="main"))


@pytest.mark.parametrize(
    ("path", "split", "name"),
    [
        ("builtin:addition", "train", "addition"),
        ("builtin:addition", "heldout", "addition-heldout"),
        ("openai/gsm8k", "train", "gsm8k"),
        ("openai/gsm8k", "test", "gsm8k-test"),
        ("/data/gsm8k/train.jsonl", "train", "gsm8k-train"),
        ("/data/sums of two.jsonl", "train", "sums-of-two"),
        ("/data/gsm8k", "train", "gsm8k"),
    ],
)
def test_a_source_is_named_after_its_path(path: str, split: str, name: str) -> None:
    assert source_name(_spec(path, split=split)) == name


def test_two_sources_of_one_name_are_refused() -> None:
    specs = [_spec("a/train.jsonl", name="maths"), _spec("b/train.jsonl", name="maths")]
    with pytest.raises(ConfigError) as raised:
        named_apart(specs, "data.train")
    assert str(raised.value) == (
        "data.train: sources 'a/train.jsonl' and 'b/train.jsonl' are both named 'maths'; "
        "give each a name of its own (`name:`)"
    )
    with pytest.raises(ConfigError, match="must be letters, digits, dot, dash, underscore, got 'a:b'"):
        source_name(_spec("a.jsonl", name="a:b"))
