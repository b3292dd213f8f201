"""The copy of the trained model to where the job wants it, by a copier process of its own."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import fsspec
import psutil
import pytest
from fakes import job

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.copying import copy
from sapo_ray.driver.interrupts import Interrupts
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.driver.output import check_output, copied
from sapo_ray.driver.pulse import Pulse
from sapo_ray.driver.result import Outcome
from sapo_ray.errors import ConfigError, ResourceError, Superseded
from sapo_ray.types import Published

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 100_000, "sub/tokenizer.json": b"[]"}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "run" / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "run" / "export"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def ended(spec: JobSpec, export: Path | None, journal: Journal) -> Outcome:
    outcome = Outcome(
        ending=None,
        abandoned=False,
        steps=3,
        before=None,
        after=None,
        seconds={},
        published=cast(Published, None),
        export=export,
    )

    async def run() -> Outcome:
        return outcome

    return await copied(run(), spec, journal, Interrupts(), Pulse())


def told(journal: Journal) -> list[dict[str, Any]]:
    """Events but for the time and number."""
    journal.sync_now()
    frame = ("time", "attempt", "seq", "seconds")
    return [{k: v for k, v in event.items() if k not in frame} for event in read_journal(journal.path)]


@pytest.fixture
def journal(tmp_path: Path, export: Path) -> Any:
    journal = Journal(tmp_path / "run" / "journal.jsonl", 1)
    yield journal
    if journal._fence is None:
        journal.close()


@pytest.mark.parametrize("scheme", ["", "file://"])
async def test_the_model_is_copied_and_the_copy_is_an_event(
    tmp_path: Path, export: Path, journal: Journal, scheme: str
) -> None:
    uri = f"{scheme}{tmp_path}/models/mine"
    outcome = await ended(job(output__uri=uri), export, journal)
    assert outcome.output == uri
    assert contents(tmp_path / "models" / "mine") == FILES
    assert told(journal) == [
        {"kind": "phase", "phase": "output"},
        {"kind": "output", "uri": uri, "files": 3, "bytes": 100_004},
    ]


async def test_a_job_that_names_no_place_and_a_run_without_export_copy_nothing(
    tmp_path: Path, export: Path, journal: Journal
) -> None:
    assert (await ended(job(), export, journal)).output is None
    assert (await ended(job(output__uri=f"{tmp_path}/models"), None, journal)).output is None
    assert not (tmp_path / "models").exists()
    assert told(journal) == []


async def test_a_copy_that_fails_is_a_condition_that_says_where_the_model_is(
    tmp_path: Path, export: Path, journal: Journal
) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = await ended(job(output__uri=f"{tmp_path}/file/models"), export, journal)
    assert (outcome.output, outcome.export) == (None, export)
    condition = told(journal)[1]
    assert condition["condition"] == "OutputNotCopied"
    assert "NotADirectoryError" in condition["reason"]
    assert f"It is whole in {export}" in condition["reason"]


async def test_a_copy_that_takes_too_long_is_ended_and_names_its_deadline(
    tmp_path: Path, export: Path, journal: Journal
) -> None:
    outcome = await ended(job(output__uri=f"{tmp_path}/models", deadlines__output_s=0.001), export, journal)
    assert outcome.output is None
    assert "not done within deadlines.output_s (0.001 s)" in told(journal)[1]["reason"]
    assert [one for one in psutil.Process().children() if "sapo_ray.driver.copying" in one.cmdline()] == []


async def test_a_copy_that_a_signal_breaks_off_leaves_the_run_a_success(
    tmp_path: Path, export: Path, journal: Journal
) -> None:
    running = asyncio.create_task(ended(job(output__uri=f"{tmp_path}/models"), export, journal))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    outcome = await running
    assert (outcome.ending, outcome.output) == (None, None)
    assert "it was broken off" in told(journal)[1]["reason"]


async def test_a_driver_that_was_superseded_while_it_copied_says_nothing_more(
    tmp_path: Path, export: Path, journal: Journal
) -> None:
    running = asyncio.create_task(ended(job(output__uri=f"{tmp_path}/models"), export, journal))
    await asyncio.sleep(0)
    journal.fence(Superseded("attempt 2 has the run"))
    running.cancel()
    with pytest.raises(Superseded):
        await running


def test_a_copy_can_be_repeated_and_does_not_mix_with_another_model(tmp_path: Path, export: Path) -> None:
    place = tmp_path / "models"
    assert copy(export, str(place)) == copy(export, f"file://{place}/") == (3, 100_004)
    (export / "model.safetensors").write_bytes(b"newer")
    copy(export, str(place))
    assert contents(place)["model.safetensors"] == b"newer"
    (place / "model-00001-of-00002.safetensors").write_bytes(b"of another")
    with pytest.raises(ResourceError, match=r"1 files that are not of this model, 'model-00001-of-00002.safetensors'"):
        copy(export, str(place))


def test_half_a_copy_has_no_config(tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "models"
    copy(export, str(place))
    (export / "model.safetensors").unlink()
    (export / "model.safetensors").symlink_to("/proc/self/mem")  # a file that cannot be read to its end
    with pytest.raises((OSError, ResourceError)):
        copy(export, str(place))
    assert "config.json" not in contents(place)


def test_any_file_system_that_fsspec_knows_can_be_copied_to(export: Path) -> None:
    assert copy(export, "memory://bucket/models/mine") == (3, 100_004)
    memory = fsspec.filesystem("memory")
    assert memory.cat_file("/bucket/models/mine/model.safetensors") == FILES["model.safetensors"]
    assert len(memory.find("/bucket")) == 3


@pytest.mark.parametrize(("uri", "why"), [("nosuch://x/y", "Protocol not known"), ("s3://b/c", "Install s3fs")])
def test_a_place_that_this_machine_cannot_write_to_is_refused_before_the_training(uri: str, why: str) -> None:
    if uri.startswith("s3") and find_spec("s3fs"):
        pytest.skip("s3fs is installed here")
    with pytest.raises(ConfigError, match=why):
        check_output(job(output__uri=uri))
    check_output(job(output__uri="/models"))
    check_output(job())
