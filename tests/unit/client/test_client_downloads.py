"""A model arrives whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from scripted_service import JOB_ID, Answer, Request, Service, problem, reply

from sapo_ray import client as api
from sapo_ray.client import Client
from sapo_ray.client.download import Damaged

LIST = f"GET /v1/jobs/{JOB_ID}/export"
FILE = f"{LIST}/files/model.safetensors"
CONTENT = bytes(range(256)) * 40


def listed(path: str = "model.safetensors", content: bytes = CONTENT) -> dict[str, object]:
    return {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def on(service: Service, *files: dict[str, object]) -> None:
    service.on(LIST, reply({"data": list(files), "has_more": False, "next": None}))


def ranged(request: Request, until: int | None = None, content: bytes = CONTENT) -> Answer:
    """What is asked for, broken off before byte `until`."""
    begin = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    end = len(content) if until is None else until
    headers = {"etag": '"one"', "content-length": str(len(content) - begin)}
    if "range" in request.headers:
        headers["content-range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
    chunks = [content[at : min(at + 1000, end)] for at in range(begin, end, 1000)]
    return Answer(206 if "range" in request.headers else 200, headers, chunks, drop=until is not None)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed())
    service.on(FILE, lambda r: ranged(r, 3500), lambda r: ranged(r, 7000), ranged)
    done: list[int] = []
    found = client.jobs.download_export(JOB_ID, tmp_path / "out", lambda path, have, size: done.append(have))
    assert found == [tmp_path / "out" / "model.safetensors"]
    assert found[0].read_bytes() == CONTENT
    assert [one.headers.get("range") for one in service.asked(FILE)] == [None, "bytes=3500-", "bytes=7000-"]
    assert service.asked(FILE)[1].headers["if-range"] == '"one"'
    assert done == sorted(done)
    assert done[-1] == 10240
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_later_call_goes_on_with_what_an_earlier_one_left(service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed())
    refused = problem(403, "forbidden", "the key lost its scope")
    service.on(FILE, lambda r: ranged(r, 4000), refused, ranged)
    with pytest.raises(api.Forbidden):
        client.jobs.download_export(JOB_ID, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    client.jobs.download_export(JOB_ID, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT
    assert service.asked(FILE)[2].headers["range"] == "bytes=4000-"


def test_what_is_there_whole_is_not_fetched_again(service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed(), listed("sub/empty.txt", b""))
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    service.on(f"{LIST}/files/sub/empty.txt", Answer())
    client.jobs.download_export(JOB_ID, tmp_path)
    assert (tmp_path / "sub" / "empty.txt").read_bytes() == b""
    assert service.asked(FILE) == []


def test_a_file_of_the_same_size_with_other_bytes_is_fetched_anew(
    service: Service, client: Client, tmp_path: Path
) -> None:
    on(service, listed())
    (tmp_path / "model.safetensors").write_bytes(CONTENT[::-1])
    (tmp_path / "model.safetensors.part").write_bytes(b"of another run" * 100)
    service.on(FILE, ranged)
    client.jobs.download_export(JOB_ID, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT
    assert [one.headers.get("range") for one in service.asked(FILE)] == ["bytes=1400-", None]


def test_damage_is_an_error_and_leaves_no_file(service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed())
    wrong = bytearray(CONTENT)
    wrong[5000] ^= 1
    service.on(FILE, lambda r: ranged(r, content=bytes(wrong)))
    with pytest.raises(Damaged, match=r"model\.safetensors arrived damaged"):
        client.jobs.download_export(JOB_ID, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_knows_no_ranges_is_read_from_the_start(
    service: Service, client: Client, tmp_path: Path
) -> None:
    on(service, listed())
    whole = {"content-length": str(len(CONTENT))}
    service.on(FILE, Answer(200, whole, [CONTENT[:6000]], drop=True), Answer(200, whole, [CONTENT]))
    client.jobs.download_export(JOB_ID, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT


def test_a_download_that_gets_no_further_is_given_up(service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed())
    service.on(FILE, lambda r: ranged(r, max(4000, int(r.headers.get("range", "bytes=0-")[6:-1]))))
    with pytest.raises(api.ConnectionFailed):
        client.jobs.download_export(JOB_ID, tmp_path)
    assert len(service.asked(FILE)) == 6
    assert (tmp_path / "model.safetensors.part").stat().st_size == 4000


def test_more_bytes_than_listed_are_damage(service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed())
    service.on(FILE, Answer(200, {}, [CONTENT, b"x" * 1000]))
    with pytest.raises(Damaged):
        client.jobs.download_export(JOB_ID, tmp_path)


def test_a_range_that_was_not_asked_for_is_refused(service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed())
    (tmp_path / "model.safetensors.part").write_bytes(CONTENT[:100])
    service.on(FILE, Answer(206, {"content-range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}, [CONTENT]))
    with pytest.raises(api.BadReply, match="range from byte 100"):
        client.jobs.download_export(JOB_ID, tmp_path)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "", "a\\b"])
def test_no_file_lands_outside_the_folder(path: str, service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed(path))
    with pytest.raises(api.BadReply, match="does not lie within"):
        client.jobs.download_export(JOB_ID, tmp_path / "in")
    assert list(tmp_path.iterdir()) == []


def test_names_are_sent_as_they_are(service: Service, client: Client, tmp_path: Path) -> None:
    on(service, listed("a folder/50%?.json", b"{}"))
    service.on(f"{LIST}/files/a%20folder/50%25%3F.json", Answer(200, {}, [b"{}"]))
    client.jobs.download_export(JOB_ID, tmp_path)
    assert (tmp_path / "a folder" / "50%?.json").read_bytes() == b"{}"
