"""Events reach the caller once each and in order, whatever happens to the connection."""

from __future__ import annotations

import json
import time

import pytest
from scripted_service import JOB_ID, Answer, Service, event, job, problem, reply, sse, stream

from sapo_ray import client as api
from sapo_ray.client import Client
from sapo_ray.client.events import EventStream, Gap
from sapo_ray.client.sse import Message, messages
from sapo_ray.errors import DeadlineExceeded

ONE = f"GET /v1/jobs/{JOB_ID}"
EVENTS = f"{ONE}/events"
NOTHING = reply({"data": [], "has_more": False, "next": None})
OVER = event(5, "transition", state="succeeded", reason="all steps were taken")


def rest(*events: object) -> Answer:
    return reply({"data": list(events), "has_more": False, "next": None})


def test_a_stream_that_breaks_is_taken_up_after_the_last_event(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()), reply(job("succeeded")))
    service.on(
        EVENTS,
        stream(sse(event(1)), sse(event(2)), sse(event(3))[:40], drop=True),
        problem(503, "unavailable", "restarting", {"retry-after": "0"}),
        stream(": heartbeat\r\n\r\n", sse(event(3)), sse(event(4)), sse(OVER)),
        NOTHING,
    )
    assert [one.id for one in client.jobs.events(JOB_ID)] == [1, 2, 3, 4, 5]
    assert [one.headers.get("last-event-id") for one in service.asked(EVENTS)] == ["0", "2", "2", None]
    assert service.asked(EVENTS)[0].headers["accept"] == "text/event-stream"


def test_what_is_sent_twice_is_told_once(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()), reply(job("succeeded")))
    twice = [sse(event(1)), sse(event(2)), sse(event(1)), sse(event(2)), sse(event(3)), sse(event(4)), sse(OVER)]
    service.on(EVENTS, stream(*twice), NOTHING)
    assert [one.id for one in client.jobs.events(JOB_ID)] == [1, 2, 3, 4, 5]


def test_an_event_that_is_missing_is_fetched_again(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()), reply(job("succeeded")))
    whole = [sse(event(2)), sse(event(3)), sse(event(4)), sse(OVER)]
    service.on(EVENTS, stream(sse(event(1)), sse(event(3))), stream(*whole), NOTHING)
    assert [one.id for one in client.jobs.events(JOB_ID)] == [1, 2, 3, 4, 5]
    assert service.asked(EVENTS)[1].headers["last-event-id"] == "1"


def test_an_event_that_stays_missing_is_an_error(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()))
    service.on(EVENTS, stream(sse(event(1)), sse(event(3))), stream(sse(event(3))))
    with pytest.raises(Gap, match="from event 1 to 3"):
        list(client.jobs.events(JOB_ID))


def test_a_failed_attempt_is_not_the_end_while_the_job_recovers(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()), reply(job("recovering")), reply(job("succeeded")))
    failed = event(1, "transition", state="failed", reason="a learner died")
    events = [failed, event(2), event(3), event(4), OVER]
    service.on(EVENTS, stream(*map(sse, events)), NOTHING)
    assert [one.id for one in client.jobs.events(JOB_ID)] == [1, 2, 3, 4, 5]
    assert len(service.asked(ONE)) == 3


def test_what_follows_the_last_transition_is_told_too(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()), reply(job("cancelled")))
    service.on(EVENTS, stream(sse(event(1, "transition", state="cancelled"))), rest(event(2, "worker"), event(3)))
    assert [one.id for one in client.jobs.events(JOB_ID)] == [1, 2, 3]
    assert service.asked(EVENTS)[1].query == "after=1&limit=500"


def test_a_job_that_is_over_needs_no_stream(service: Service, client: Client) -> None:
    service.on(ONE, reply(job("failed")))
    service.on(EVENTS, reply({"data": [event(8)], "has_more": True, "next": "8"}), rest(event(9)))
    assert [one.id for one in client.jobs.events(JOB_ID, after=7)] == [8, 9]
    assert [one.query for one in service.asked(EVENTS)] == ["after=7&limit=500", "after=8&limit=500"]


def test_without_following_only_what_is_stored_is_told(service: Service, client: Client) -> None:
    service.on(EVENTS, rest(event(1), event(2)))
    assert [one.id for one in client.jobs.events(JOB_ID, follow=False)] == [1, 2]
    assert len(service.requests) == 1


def test_a_stream_that_falls_silent_is_opened_anew(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()), reply(job("succeeded")))
    service.on(
        EVENTS, stream(sse(event(1)), ": late\n\n", pause_s=0.8), stream(sse(event(1)), sse(OVER | {"id": 2})), NOTHING
    )
    followed = EventStream(client._transport, f"/v1/jobs/{JOB_ID}", after=0, silence_s=0.3)
    assert [one.id for one in followed.follow()] == [1, 2]


def test_a_service_that_does_not_come_back_is_given_up(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()))
    service.on(EVENTS, stream(sse(event(1)), drop=True), problem(503, "unavailable", "gone", {"retry-after": "0"}))
    followed = EventStream(client._transport, f"/v1/jobs/{JOB_ID}", after=0, give_up_s=0.3)
    events = followed.follow()
    assert next(events).id == 1
    with pytest.raises(api.Unavailable, match="gone"):
        next(events)


def test_a_job_of_another_tenant_ends_the_iterator_at_once(service: Service, client: Client) -> None:
    service.on(ONE, problem(404, "not_found", "there is no such job"))
    with pytest.raises(api.NotFound):
        next(client.jobs.events(JOB_ID))
    assert len(service.requests) == 1


def test_a_job_that_is_deleted_meanwhile_ends_waiting_and_watching_in_those_words(
    service: Service, client: Client
) -> None:
    service.on(ONE, reply(job()), problem(404, "not_found", "there is no such job"))
    service.on(EVENTS, stream(sse(event(1))))
    with pytest.raises(api.NotFound, match="the job was deleted"):
        client.jobs.wait(JOB_ID, 30.0)
    service.on(ONE, reply(job()))
    service.on(EVENTS, problem(404, "not_found", "there is no such job"))
    with pytest.raises(api.NotFound, match="the job was deleted"):
        list(client.jobs.events(JOB_ID))


def test_waiting_returns_the_ended_job_after_all_its_events(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()), reply(job("succeeded", result={"status": "succeeded"})))
    service.on(EVENTS, stream(sse(event(1)), sse(event(2, "transition", state="succeeded"))), rest(event(3)))
    heard: list[int] = []
    found = client.jobs.wait(JOB_ID, 30.0, lambda one: heard.append(one.id))
    assert (found.status.state, found.status.result) == ("succeeded", {"status": "succeeded"})
    assert heard == [1, 2, 3]


def test_waiting_ends_at_a_pause_but_not_at_one_that_is_over(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()), reply(job("running")), reply(job("paused")))
    paused = [event(n, "transition", state=state) for n, state in enumerate(("paused", "queued", "paused"), 1)]
    service.on(EVENTS, stream(*map(sse, paused)), NOTHING)
    heard: list[int] = []
    assert client.jobs.wait(JOB_ID, 30.0, lambda one: heard.append(one.id)).status.state == "paused"
    assert heard == [1, 2, 3]


def test_waiting_is_bounded_though_heartbeats_go_on(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()))
    beats = Answer(200, {"content-type": "text/event-stream"}, [b": heartbeat\n\n"] * 200, pause_s=0.05)
    service.on(EVENTS, beats)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=f"{JOB_ID} had not ended after 0.5 s"):
        client.jobs.wait(JOB_ID, 0.5)
    assert time.monotonic() - began < 3.0


def test_waiting_is_bounded_in_silence(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()))
    service.on(EVENTS, Answer(200, {"content-type": "text/event-stream"}, [b":\n\n", b":\n\n"], pause_s=4.0))
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.jobs.wait(JOB_ID, 0.5)
    assert time.monotonic() - began < 3.0


def read(*chunks: bytes) -> list[Message | None]:
    return list(messages(chunks))


def test_a_message_may_be_cut_anywhere() -> None:
    wire = b'id: 7\r\nevent: step\r\ndata: {"a":\r\ndata: 1}\r\n\r\n: beat\r\n\r\ndata:x\n\ndata: lost\n'
    whole = [Message(id="7", event="step", data='{"a":\n1}'), None, Message(id="7", event="message", data="x")]
    assert read(wire) == whole
    assert read(*(wire[at : at + 1] for at in range(len(wire)))) == whole


def test_lines_end_only_where_the_standard_says() -> None:
    text = "a\u2028b\u0085c\x0bd\x1ce"
    assert read(f"data: {text}\n\n".encode()) == [Message(id=None, event="message", data=text)]
    assert read(b"data: a\r\rdata: b\r\n\r\n") == [
        Message(id=None, event="message", data="a"),
        Message(id=None, event="message", data="b"),
    ]


def test_text_that_is_no_text_is_refused() -> None:
    with pytest.raises(api.BadReply, match="UTF-8"):
        read(b"data: \xff\n\n")
    with pytest.raises(api.BadReply, match="32 MiB"):
        read(*[b"x" * (1 << 20)] * 34)


def test_an_event_that_cannot_be_read_is_an_error(service: Service, client: Client) -> None:
    service.on(ONE, reply(job()))
    service.on(EVENTS, stream("id: 1\ndata: not json\n\n"))
    with pytest.raises(api.BadReply, match="not JSON"):
        list(client.jobs.events(JOB_ID))
    service.on(EVENTS, stream(f"id: 1\ndata: {json.dumps({'id': 1})}\n\n"))
    with pytest.raises(api.BadReply, match="cannot read"):
        list(client.jobs.events(JOB_ID))
