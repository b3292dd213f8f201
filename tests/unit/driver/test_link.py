"""The link against a server that follows the protocol strictly and fails in every way it allows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_control import TOKEN, FakeControl, orders

from sapo_ray.api.link import Orders
from sapo_ray.driver import link as links
from sapo_ray.driver import wire as wires
from sapo_ray.driver.journal import Journal, read_journal
from sapo_ray.driver.link import Link
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.outbox import BATCH_BYTES, Outbox
from sapo_ray.driver.wire import Wire
from sapo_ray.errors import CheckpointError, SapoRayError, Superseded


@pytest.fixture
def control() -> Iterator[FakeControl]:
    control = FakeControl().start()
    yield control
    control.stop()


class Driver:
    """A journal and its link, as a run has them."""

    def __init__(self, control: FakeControl, folder: Path, attempt: int = 1, token: str = TOKEN) -> None:
        self.orders = StandingOrders()
        self.wire = Wire(control.url, "job-1", attempt, token)
        self.link = Link(self.wire, self.orders)
        self.journal = Journal(folder / "journal.jsonl", attempt, self.link.hear)
        self.link.open(self.journal)

    def events(self, count: int, kind: str = "step", **fields: Any) -> None:
        for number in range(count):
            self.journal.ledger("issued", group=f"t:{number}:0")
            self.journal.event(kind, number=number, **fields)

    def end(self) -> None:
        self.link.close()
        self.journal.close()
        self.wire.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPO_LINK_INTERVAL_S", "0.05")
    monkeypatch.setenv("SAPO_LINK_FLUSH_S", "20")


def failure(orders: StandingOrders) -> SapoRayError:
    """What the link ended the run with."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            orders.check()
        except SapoRayError as error:
            return error
        time.sleep(0.005)
    raise AssertionError("the run was not ended")


def numbers(control: FakeControl, attempt: int = 1) -> list[int]:
    return [event["number"] for event in control.events(attempt)]


def test_events_arrive_as_they_were_journalled_and_the_ledger_stays_at_home(
    control: FakeControl, tmp_path: Path
) -> None:
    driver = Driver(control, tmp_path)
    driver.events(3, metrics={"loss": float("nan"), "text": "Zürich"})
    driver.end()
    journalled = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert control.events() == [record for record in journalled if "seq" in record]
    assert [event["seq"] for event in control.events()] == [1, 2, 3]
    assert control.events()[0]["metrics"] == {"loss": None, "text": "Zürich"}


def test_whatever_befalls_a_call_each_event_is_stored_once_and_in_order(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires, "CALL_S", 0.3)
    driver = Driver(control, tmp_path)
    for fault in ("503", "lost", "late", "429", "nonsense", "proxy", "lost", "refused", "late"):
        control.faults.append(fault)
        driver.events(7)
        control.wait_for(lambda: not control.faults)
    driver.end()
    assert numbers(control) == list(range(7)) * 9
    assert [event["seq"] for event in control.events()] == list(range(1, 64))


def test_after_an_outage_all_events_are_there_in_batches_of_bounded_size(control: FakeControl, tmp_path: Path) -> None:
    driver = Driver(control, tmp_path)
    driver.events(5)
    control.wait_for(lambda: len(control.events()) == 5)
    control.stop()
    driver.events(2000)
    driver.events(40, text="x" * 20_000)
    time.sleep(0.3)
    control.batches.clear()
    control.start()
    driver.end()
    assert numbers(control) == [*range(5), *range(2000), *range(40)]
    assert max(control.batches) == 500
    assert max(control.batches[-4:]) <= BATCH_BYTES // 20_000


def test_a_control_plane_that_lost_events_gets_them_again(control: FakeControl, tmp_path: Path) -> None:
    driver = Driver(control, tmp_path)
    driver.events(20)
    control.wait_for(lambda: len(control.events()) == 20)
    del control.stored[1][7:]
    driver.events(1)
    driver.end()
    assert numbers(control) == [*range(20), 0]


def test_an_event_is_not_shipped_before_it_is_on_the_disk(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(control, tmp_path)
    real = os.fsync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sapo_ray.driver.journal.os.fsync", full)
    driver.events(2)
    beats = control.heartbeats
    control.wait_for(lambda: control.heartbeats > beats + 3)
    assert control.events() == [], "the driver lives, and says so; what is not durable it does not say"
    monkeypatch.setattr("sapo_ray.driver.journal.os.fsync", real)
    control.wait_for(lambda: len(control.events()) == 2)
    driver.end()


def test_a_silent_run_sends_heartbeats_and_hears_orders(control: FakeControl, tmp_path: Path) -> None:
    driver = Driver(control, tmp_path)
    control.wait_for(lambda: control.heartbeats >= 3)
    assert driver.orders.ending is None
    control.orders = orders(state="cancel", discard=True, checkpoint_request=2)
    control.wait_for(lambda: driver.orders.ending == "cancelled")
    assert driver.orders.discard
    assert driver.orders.checkpoint_request() == 2
    driver.end()


def test_a_step_does_not_wait_for_the_interval(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_LINK_INTERVAL_S", "3600")
    driver = Driver(control, tmp_path)
    control.wait_for(lambda: control.heartbeats == 1)
    driver.events(1, kind="phase")
    driver.events(1, kind="step")
    control.wait_for(lambda: len(control.events()) == 2)
    driver.end()


def test_a_superseded_driver_writes_no_more_and_its_run_is_ended(control: FakeControl, tmp_path: Path) -> None:
    driver = Driver(control, tmp_path)
    driver.events(2)
    control.wait_for(lambda: len(control.events()) == 2)
    control.newest = 2

    async def trains() -> None:
        async with driver.orders.heeded(lambda _: None):
            await asyncio.sleep(30)

    with pytest.raises(Superseded, match="attempt 1 of job-1 was superseded"):
        asyncio.run(trains())
    before = (tmp_path / "journal.jsonl").read_bytes()
    for write in (lambda: driver.events(1), driver.journal.sync_now):
        with pytest.raises(Superseded):
            write()
    driver.end()
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    assert len(control.events()) == 2


def test_a_token_that_is_refused_for_long_ends_the_run_as_a_pause_does(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_LINK_REFUSED_S", "0.3")
    driver = Driver(control, tmp_path, token="another")
    calls = control.calls
    control.wait_for(lambda: driver.orders.ending is not None)
    assert driver.orders.ending == "paused"
    assert control.calls - calls >= 3
    driver.orders.check()
    assert isinstance(error := driver.orders.unwanted, Superseded)
    assert "refused this attempt's token for 0.3 s and more (status 401 unauthenticated" in str(error)
    driver.events(1)  # the journal is not fenced: the last step, its checkpoint and the end are recorded
    driver.end()
    kinds = [record["kind"] for record in read_journal(tmp_path / "journal.jsonl")]
    assert kinds == ["condition", "issued", "step"]


def test_refusals_do_not_end_a_run_before_their_time(control: FakeControl, tmp_path: Path) -> None:
    control.faults.extend(["refused"] * 10)
    driver = Driver(control, tmp_path)
    driver.events(1)
    control.wait_for(lambda: bool(control.events()))
    assert driver.orders.ending is None
    driver.end()


@pytest.mark.parametrize("fault", ["login", "gateway", "proxy"])
def test_a_proxy_that_wants_a_login_is_an_outage(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("SAPO_LINK_REFUSED_S", "0")
    control.faults.extend([fault] * 8)
    driver = Driver(control, tmp_path)
    driver.events(1)
    control.wait_for(lambda: bool(control.events()))
    driver.orders.check()
    assert driver.orders.ending is None
    driver.end()


def test_a_token_that_is_known_again_while_the_run_ends_brings_the_last_events_home(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_LINK_REFUSED_S", "0")
    control.faults.extend(["refused"] * 6)
    driver = Driver(control, tmp_path)
    control.wait_for(lambda: driver.orders.ending == "paused")
    control.wait_for(lambda: not control.faults)
    control.wait_for(lambda: bool(control.events()))
    driver.events(1)
    driver.end()
    assert [event["kind"] for event in control.events()] == ["condition", "step"]
    assert driver.orders.ending == "paused", "what was begun is finished"


def test_refusals_between_which_the_token_was_good_are_forgiven(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_LINK_REFUSED_S", "0")
    driver = Driver(control, tmp_path)
    for _ in range(3):
        control.faults.extend(["refused", "refused", ""])
        driver.events(1)
        control.wait_for(lambda: not control.faults)
    driver.end()
    assert driver.orders.ending is None
    assert len(control.events()) == 3


def test_a_second_driver_of_the_same_attempt_is_found_by_its_numbers(control: FakeControl, tmp_path: Path) -> None:
    control.stored[1] = [{"seq": seq} for seq in range(1, 10)]
    driver = Driver(control, tmp_path)
    with contextlib.suppress(Superseded):  # the link may be quicker, and then nothing is written any more
        driver.events(1)
    assert "another driver of the same attempt" in str(failure(driver.orders))
    driver.end()


def test_batches_shrink_to_what_the_control_plane_takes(control: FakeControl, tmp_path: Path) -> None:
    control.largest = 3000
    driver = Driver(control, tmp_path)
    driver.events(50, text="x" * 300)
    driver.events(1, text="x" * 5000, step=7)
    driver.events(1)
    driver.end()
    assert numbers(control) == [*range(50), 0, 0]
    shortened = control.events()[50]
    assert shortened["shortened"] == ["text"]
    assert (shortened["step"], shortened["kind"]) == (7, "step"), "its place is kept, and what is short"


def test_an_event_that_is_refused_leaves_a_note_with_its_number_and_those_behind_it_arrive(
    control: FakeControl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control.accepts = lambda event: event.get("step") != "bad"
    driver = Driver(control, tmp_path)
    with caplog.at_level(logging.ERROR):
        driver.events(4)
        driver.events(1, step="bad")
        driver.events(30)
        driver.events(1, kind="transition", state="succeeded", step="bad")
        driver.end()
    assert [event["seq"] for event in control.events()] == list(range(1, 37))
    assert [event["kind"] for event in control.events()] == ["step"] * 35 + ["transition"]
    note, last = control.events()[4], control.events()[35]
    assert set(note) == {"time", "attempt", "seq", "kind", "refused", "reason"}
    assert note["refused"] is True
    assert "422 invalid_request" in note["reason"]
    assert "events[0].step: of another shape" in note["reason"]
    assert (last["refused"], last["state"]) == (True, "succeeded"), "how the run ended is not lost"
    assert [event["number"] for event in control.events() if "number" in event] == [*range(4), *range(30)]
    assert "refused event 5 (step)" in caplog.text
    assert "refused event 36 (transition)" in caplog.text


def test_a_batch_that_is_refused_for_a_moment_arrives_whole(control: FakeControl, tmp_path: Path) -> None:
    refused: list[int] = []

    def accepts(event: dict[str, Any]) -> bool:
        refused.append(event["seq"])
        return len(refused) > 2

    control.accepts = accepts
    driver = Driver(control, tmp_path)
    driver.events(20)
    driver.end()
    assert numbers(control) == list(range(20))


def test_answers_may_have_fields_that_this_version_does_not_know(control: FakeControl, tmp_path: Path) -> None:
    control.more = {"introduced": {"later": True}}
    driver = Driver(control, tmp_path)
    driver.events(2)
    driver.end()
    assert numbers(control) == [0, 1]
    control.assignment = {"run_dir": "/run", "spec": {}}
    assert Wire(control.url, "job-1", 1, TOKEN).assignment().run_dir == "/run"


def test_events_that_could_not_be_delivered_in_time_are_named_and_kept(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAPO_LINK_FLUSH_S", "0.5")
    driver = Driver(control, tmp_path)
    driver.events(1)
    control.wait_for(lambda: len(control.events()) == 1)
    control.stop()
    driver.events(3)
    with caplog.at_level(logging.WARNING):
        driver.end()
    assert "did not take the last 3 events within 0.5 s; they are in" in caplog.text
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 8
    control.start()


def test_only_events_of_this_attempt_are_shipped(control: FakeControl, tmp_path: Path) -> None:
    first = Driver(control, tmp_path)
    first.events(4)
    first.end()
    control.newest = 2
    second = Driver(control, tmp_path, attempt=2)
    second.events(2)
    second.end()
    assert numbers(control) == [0, 1, 2, 3]
    assert numbers(control, 2) == [0, 1]


def test_a_damaged_journal_ends_the_run(control: FakeControl, tmp_path: Path) -> None:
    driver = Driver(control, tmp_path)
    driver.events(1)
    control.wait_for(lambda: len(control.events()) == 1)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"time":1,"attempt":1,"seq":torn\n')
    driver.events(1)
    assert isinstance(failure(driver.orders), CheckpointError)
    driver.end()


def test_a_defect_of_the_link_ends_the_run_instead_of_leaving_it_unheard(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object) -> None:
        raise KeyError("of its own")

    monkeypatch.setattr(links.Outbox, "batch", defect)
    driver = Driver(control, tmp_path)
    assert "the link to the control plane failed: KeyError('of its own')" in str(failure(driver.orders))
    driver.end()


def test_an_outbox_reads_back_from_any_number_it_is_asked_for(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl", 1).close()
    journal = Journal(tmp_path / "journal.jsonl", 2)
    for number in range(30):
        journal.ledger("graded", group="g" * 1000)
        journal.event("step", number=number)
    journal.sync_now()
    outbox = Outbox(journal.path, 2, journal.start)

    def read(first: int, count: int) -> list[int]:
        return [event["seq"] for event in outbox.batch(first, journal.durable, count)]

    assert read(1, 10) == list(range(1, 11))
    assert read(11, 500) == list(range(11, 31))
    assert read(31, 500) == []
    assert read(5, 3) == [5, 6, 7]
    assert read(29, 500) == [29, 30]
    journal.event("step")
    assert read(31, 500) == [], "not yet on the disk"
    journal.sync_now()
    assert read(31, 500) == [31]
    journal.close()
    whole = journal.durable
    os.truncate(journal.path, journal.path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=rf"{whole} were durable: somebody cut it short"):
        outbox.batch(1, whole)


def test_orders_are_those_of_the_protocol() -> None:
    standing = StandingOrders(Orders(**orders(checkpoint_request=4)))
    assert standing.checkpoint_request() is None, "met before this driver began"
    standing.receive(Orders(**orders(checkpoint_request=5)))
    assert standing.checkpoint_request() == 5
    standing.checkpoint_made(5)
    assert standing.checkpoint_request() is None
