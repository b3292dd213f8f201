"""Uploads: whole and looked at row by row, or refused with the line, and then nothing is left."""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from api_parts import Connect, problem
from httpx import Response
from starlette.testclient import TestClient

from sapo_ray.control import uploads

ROWS = b'{"question": "1+1", "answer": "2"}\n{"question": "2+2", "answer": "4", "level": 1}\n'
JSONL = {"Content-Type": "application/jsonl"}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def upload(client: TestClient, content: bytes, **more: Any) -> Response:
    return client.post("/v1/datasets?name=rows.jsonl", content=content, headers=JSONL | more.get("headers", {}))


def left(client: TestClient) -> list[Path]:
    folder: Path = client.app.state.control.settings.datasets_dir  # type: ignore[attr-defined]
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_body_that_is_the_file_and_a_form_with_the_file_give_the_same(acme: TestClient) -> None:
    raw = upload(acme, ROWS)
    form = acme.post("/v1/datasets", files={"file": ("rows.jsonl", ROWS)})
    assert (raw.status_code, form.status_code) == (201, 201)
    for answer in (raw, form):
        found = answer.json()
        assert (found["name"], found["format"], found["rows"], found["bytes"]) == ("rows.jsonl", "jsonl", 2, len(ROWS))
        assert found["columns"] == ["question", "answer", "level"]
        assert found["sha256"] == hashlib.sha256(ROWS).hexdigest()
        assert acme.get(answer.headers["Location"]).json() == found
    assert {path.read_bytes() for path in left(acme)} == {ROWS}
    assert [one["id"] for one in acme.get("/v1/datasets").json()["data"]] == [form.json()["id"], raw.json()["id"]]


def test_a_form_names_and_types_its_file(acme: TestClient) -> None:
    answer = acme.post("/v1/datasets", files={"file": ("x.bin", ROWS)}, data={"name": "sums", "format": "jsonl"})
    assert (answer.json()["name"], answer.json()["format"]) == ("sums", "jsonl")
    assert (
        problem(acme.post("/v1/datasets", files={"data": ("x.jsonl", ROWS)}), 422, "invalid_request")["param"] == "file"
    )
    wrong = acme.post("/v1/datasets", files={"file": ("x.jsonl", ROWS)}, data={"nmae": "x"})
    assert "nmae" in problem(wrong, 422, "invalid_request")["detail"]
    problem(acme.post("/v1/datasets", files={"file": ("x.csv", b"a,b\n")}), 422, "invalid_request")


def test_parquet_is_read_through_and_described(acme: TestClient) -> None:
    content = parquet([{"question": "1+1", "answer": "2"}] * 3)
    answer = acme.post(
        "/v1/datasets?name=rows.parquet", content=content, headers={"Content-Type": "application/octet-stream"}
    )
    found = answer.json()
    assert (found["format"], found["rows"], found["columns"]) == ("parquet", 3, ["question", "answer"])


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"not parquet at all" * 10, parquet([{"a": "x" * 100}] * 100)[:-20], parquet([])]
)
def test_a_damaged_or_empty_parquet_file_is_refused(acme: TestClient, content: bytes) -> None:
    answer = acme.post(
        "/v1/datasets?format=parquet", content=content, headers={"Content-Type": "application/octet-stream"}
    )
    assert str(left(acme)) == "[]"
    assert "/" not in problem(answer, 422, "invalid_dataset")["detail"]


def test_without_pyarrow_parquet_is_refused_with_the_way_out(acme: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from sapo_ray.control import parquet as reader

    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    found = reader.examine("any.parquet")
    assert "not installed" in found["error"]
    assert "JSONL" in found["hint"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"question": ', "line 3: not valid JSON at column 14"),
        (b"[1, 2]", "line 3: must be a JSON object, got list"),
        (b'"text"', "line 3: must be a JSON object, got str"),
        (b'{"question": "\xff"}', "line 3: not valid UTF-8 at byte 15 of the line (0xff)"),
        (b'{"question": ' + b"9" * 5000 + b"}", "line 3: not readable as JSON"),
        (b"[" * 100_000, "line 3: not readable as JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_kept(acme: TestClient, line: bytes, said: str) -> None:
    found = problem(upload(acme, ROWS + line + b"\n" + ROWS), 422, "invalid_dataset")
    assert said in found["detail"]
    assert found["param"] == "line 3"
    assert left(acme) == []
    assert acme.get("/v1/datasets").json()["data"] == []


def test_all_bad_lines_are_listed_up_to_twenty(acme: TestClient) -> None:
    found = problem(upload(acme, b"{}\nx\n{}\ny\n"), 422, "invalid_dataset")
    assert [one["param"] for one in found["errors"]] == ["line 2", "line 4"]
    assert len(problem(upload(acme, b"x\n" * 100), 422, "invalid_dataset")["errors"]) == 20


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_a_row_is_refused(acme: TestClient, content: bytes) -> None:
    assert "no row" in problem(upload(acme, content), 422, "invalid_dataset")["detail"]


def test_a_byte_order_mark_and_empty_lines_are_no_rows(acme: TestClient) -> None:
    assert upload(acme, b"\xef\xbb\xbf" + ROWS + b"\n\r\n" + ROWS[:-1]).json()["rows"] == 4


def test_a_line_that_would_fill_the_memory_is_refused(connect: Connect) -> None:
    client = connect(max_row_bytes=100)
    found = problem(upload(client, b'{"a": "' + b"x" * 200 + b'"}\n'), 422, "invalid_dataset")
    assert "longer than 100 bytes" in found["detail"]


def test_an_upload_beyond_the_limit_is_413_while_it_comes(connect: Connect) -> None:
    client = connect(max_upload_bytes=1000)
    sent: list[int] = []

    def endless() -> Any:
        for number in range(10_000):
            sent.append(number)
            yield b'{"a": 1}\n' * 1000

    answer = client.post("/v1/datasets?format=jsonl", content=endless(), headers=JSONL)
    problem(answer, 413, "too_large")
    assert left(client) == []
    form = client.post("/v1/datasets", files={"file": ("x.jsonl", b'{"a": 1}\n' * 20_000)})
    problem(form, 413, "too_large")


def test_a_full_disk_is_507_and_leaves_nothing(acme: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "_write", full)
        answer = upload(acme, ROWS)
    assert "nothing was kept" in problem(answer, 507, "disk_full")["detail"]
    assert left(acme) == []
    with monkeypatch.context() as patch:
        patch.setattr(uploads.os, "replace", full)
        problem(upload(acme, ROWS), 507, "disk_full")
    assert left(acme) == []
    assert acme.get("/v1/datasets").json()["data"] == []
    assert upload(acme, ROWS).status_code == 201


def test_too_little_space_is_refused_before_anything_is_written(connect: Connect) -> None:
    client = connect(min_free_gb=1e9)
    problem(upload(client, ROWS), 507, "disk_full")


def test_data_sets_beyond_what_a_tenant_may_keep_are_refused_and_leave_nothing(connect: Connect) -> None:
    row = b'{"question": "q", "answer": "a"}\n'
    client = connect(max_dataset_bytes_per_tenant=2 * len(row))
    first = upload(client, row).json()["id"]
    assert upload(client, row).status_code == 201
    before = left(client)
    problem(upload(client, row), 409, "quota_exceeded")
    assert left(client) == before
    assert client.delete(f"/v1/datasets/{first}").status_code == 204
    assert upload(client, row).status_code == 201


def test_an_upload_repeated_with_its_key_is_one_data_set(acme: TestClient) -> None:
    key = {"headers": {"Idempotency-Key": "u1"}}
    first, again = upload(acme, ROWS, **key), upload(acme, ROWS, **key)
    assert again.json() == first.json()
    assert len(left(acme)) == 1
    problem(upload(acme, ROWS + ROWS, **key), 422, "key_reused")
    assert len(left(acme)) == 1


def test_data_sets_are_the_tenants_own(acme: TestClient, rival: TestClient) -> None:
    made = upload(acme, ROWS).json()
    problem(rival.get(f"/v1/datasets/{made['id']}"), 404, "not_found")
    problem(rival.delete(f"/v1/datasets/{made['id']}"), 404, "not_found")
    assert rival.get("/v1/datasets").json()["data"] == []
    assert acme.delete(f"/v1/datasets/{made['id']}").status_code == 204
    assert left(acme) == []
    problem(acme.get(f"/v1/datasets/{made['id']}"), 404, "not_found")


@pytest.mark.parametrize("name", ["../../etc/passwd.jsonl", "..\\x.jsonl", "/abs.jsonl"])
def test_a_name_is_only_a_name(acme: TestClient, name: str) -> None:
    found = acme.post("/v1/datasets", params={"name": name}, content=ROWS, headers=JSONL).json()
    assert found["name"] == name.replace("\\", "/").rpartition("/")[2]
    assert all(path.parent.name == "acme" for path in left(acme))


@pytest.mark.parametrize("name", ["a\nb.jsonl", "x" * 201, "\u202egpj.jsonl"])
def test_a_name_that_would_mislead_is_refused(acme: TestClient, name: str) -> None:
    answer = acme.post("/v1/datasets", params={"name": name}, content=ROWS, headers=JSONL)
    assert problem(answer, 422, "invalid_request")["param"] == "name"


def test_an_upload_of_another_kind_is_415(acme: TestClient) -> None:
    problem(
        acme.post("/v1/datasets", content=ROWS, headers={"Content-Type": "text/csv"}), 415, "unsupported_media_type"
    )


def test_what_a_killed_service_left_of_uploads_goes_at_the_next_start(
    connect: Connect, configure: Callable[..., Any]
) -> None:
    import os

    folder = configure().datasets_dir / "acme"
    folder.mkdir(parents=True)
    old, young = folder / ".upload-old", folder / ".upload-young"
    old.write_text("x")
    young.write_text("x")
    os.utime(old, (1, 1))
    connect()
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b'{"question": "\\ud800 x"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"question": NaN}', "NaN"),
        (b'{"question": -Infinity}', "-Infinity"),
    ],
)
def test_a_row_that_is_not_json_by_the_letter_is_refused_with_its_line(acme: TestClient, bad: bytes, said: str) -> None:
    found = problem(upload(acme, ROWS + bad + b"\n"), 422, "invalid_dataset")
    assert found["param"] == "line 3"
    assert said in found["detail"]
    assert left(acme) == []
    assert upload(acme, b'{"question": "\\ud83d\\ude00"}\n').status_code == 201


def test_a_data_set_whose_answer_cannot_be_written_is_not_kept(
    acme: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def examined(*arguments: object) -> uploads.Contents:
        return uploads.Contents(rows=1, columns=["\ud800"])

    monkeypatch.setattr("sapo_ray.control.routes.datasets.examine", examined)
    assert upload(acme, ROWS).status_code == 500
    assert (left(acme), acme.get("/v1/datasets").json()["data"]) == ([], [])
