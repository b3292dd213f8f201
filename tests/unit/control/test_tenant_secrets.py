"""Files in the operator's folder of secrets, as operators leave them there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sapo_ray.control.problems import Refused
from sapo_ray.control.tenant_secrets import Unusable, names, value, values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "acme").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b"s3cr3t", "s3cr3t"),
        (b"s3cr3t\n", "s3cr3t"),
        (b"s3cr3t\r\n", "s3cr3t"),
        (b"two\nlines\n", "two\nlines"),
        (b"s3cr3t\n\n", "s3cr3t\n"),
        (b" spaces stay ", " spaces stay "),
        (b"\xef\xbb\xbfs3cr3t", "s3cr3t"),
        ("gehe\u00efm".encode(), "gehe\u00efm"),
        (b"x" * 65536, "x" * 65536),
    ],
)
def test_a_secret_is_the_files_text_without_the_end_of_its_last_line(folder: Path, written: bytes, read: str) -> None:
    (folder / "acme" / "TOKEN").write_bytes(written)
    assert value(folder, "acme", "TOKEN") == read
    assert values(folder, "acme", ["TOKEN", "TOKEN"]) == {"TOKEN": read}


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (b"\xff\xfe\x00s", "not UTF-8"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"a\0b", "holds a zero byte"),
        (b"x" * 65537, "more than 65536 bytes"),
    ],
)
def test_a_file_that_no_environment_can_hold_is_refused_without_showing_it(
    folder: Path, written: bytes, why: str
) -> None:
    (folder / "acme" / "TOKEN").write_bytes(written)
    with pytest.raises(Unusable, match=why) as caught:
        value(folder, "acme", "TOKEN")
    assert str(folder) not in str(caught.value)


def test_only_files_named_like_environment_variables_are_secrets(folder: Path) -> None:
    (folder / "acme" / "FOLDER").mkdir()
    for name in ("HF_TOKEN", "_X1", "lower", "1ST", "WITH-DASH", "HF_TOKEN~", ".HF_TOKEN.swp", "A" * 129, "README.md"):
        (folder / "acme" / name).write_text("v")
    (folder / "acme" / "LINKED").symlink_to(folder / "acme" / "HF_TOKEN")
    (folder / "acme" / "DANGLING").symlink_to(folder / "nowhere")
    assert names(folder, "acme") == ["HF_TOKEN", "LINKED", "_X1"]
    for name in ("lower", "../acme/HF_TOKEN", "FOLDER", "DANGLING", ""):
        with pytest.raises(Unusable):
            value(folder, "acme", name)


def test_storage_that_does_not_answer_is_told_from_a_secret_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    (folder / "acme" / "TOKEN").write_text("v")
    monkeypatch.setattr(os, "scandir", fails)
    monkeypatch.setattr("builtins.open", fails)
    for ask in (lambda: names(folder, "acme"), lambda: value(folder, "acme", "TOKEN")):
        with pytest.raises(Refused, match=r"secrets cannot be read \(Stale file handle\)") as caught:
            ask()
        assert caught.value.status_code == 503


@pytest.mark.parametrize("tenant", ["rival", "..", ".", "acme/../acme", "/etc"])
def test_another_tenant_has_none_of_them(folder: Path, tenant: str) -> None:
    (folder / "acme" / "TOKEN").write_text("v")
    (folder / "TOKEN").write_text("v")
    assert names(folder, tenant) == []
    with pytest.raises(Unusable, match="no such secret"):
        value(folder, tenant, "TOKEN")
    assert names(None, "acme") == []
