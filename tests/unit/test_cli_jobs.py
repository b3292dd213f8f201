"""Commands for jobs on a service: what they send, print, and end with."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_service import JOB_ID, Answer, Service, event, job, problem, reply, serving, sse, stream
from typer.testing import CliRunner, Result

from sapo_ray.cli import app

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
ONE = f"/v1/jobs/{JOB_ID}"
NOTHING = reply({"data": [], "has_more": False, "next": None})


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(Service()) as running:
        yield running


def invoke(service: Service, *arguments: str) -> Result:
    environment = {"COLUMNS": "80", "SAPO_URL": service.url, "SAPO_API_KEY": "sapo_key"}
    return CliRunner(env=environment).invoke(app, list(arguments))


def listed(*rows: Any) -> Answer:
    return reply({"data": list(rows), "has_more": False, "next": None})


RESULT = {
    "accuracy": {
        "before": {"greedy": {"mean": 0.2, "low": 0.1, "high": 0.3, "prompts": 512, "errors": 0}, "sampled": None},
        "after": {"greedy": {"mean": 0.9, "low": 0.8, "high": 0.95, "prompts": 512, "errors": 0}, "sampled": None},
    },
    "seconds": {"train": 60.0, "export": 1.5},
    "run_dir": "/data/runs/a",
    "export": "/data/runs/a/export",
}
for accuracy in RESULT["accuracy"].values():
    accuracy["by_source"] = {}  # type: ignore[index]

STORY = (
    event(1, "transition", state="queued", reason="submitted") | {"source": "control"},
    event(2, "transition", state="starting", run_dir="/data/runs/a", changes=[]),
    event(3, "phase", phase="train", step=0, steps=2),
    event(4, "step", step=2, steps=2, drops={}, metrics={"reward/mean": 0.75}),
    event(5, "evaluation", step=2, greedy={"mean": 0.953}),
    event(6, "condition", condition="Advice", reason="one update [per] step"),
    event(7, "rollback", to_step=0, checkpoint=None),
    event(8, "evaluation", accuracy="as another version says it"),
)


def tells(service: Service, *ends: dict[str, Any], state: str, **status: Any) -> None:
    """The job's whole story, then `ends`, after which it is in `state`."""
    service.on(f"GET {ONE}", reply(job()), reply(job(state, **status)))
    service.on(f"GET {ONE}/events", stream(*map(sse, (*STORY, *ends))), NOTHING)


def end(state: str, reason: str = "as it is") -> dict[str, Any]:
    return event(9, "transition", state=state, reason=reason)


def test_submitting_prints_the_id_and_nothing_else(service: Service) -> None:
    service.on("POST /v1/jobs", reply(job("queued"), 201))
    options = ("--priority", "70", "--label", "team=a", "--label", "why=x=y", "--set", "rollout.workers=1")
    result = invoke(service, "submit", QUICKSTART, *options)
    assert (result.exit_code, result.stdout) == (0, f"{JOB_ID}\n")
    sent = service.requests[0].json
    assert (sent["priority"], sent["labels"]) == (70, {"team": "a", "why": "x=y"})
    assert sent["spec"]["rollout"]["workers"] == 1


def test_a_job_without_overrides_is_sent_as_it_was_written(service: Service, tmp_path: Path) -> None:
    service.on("POST /v1/jobs", reply(job("queued"), 201))
    path = tmp_path / "job.yaml"
    path.write_text("preset: of-tomorrow\nunknown: 1e-6\n")
    found = json.loads(invoke(service, "submit", str(path), "--json").stdout)
    assert found["id"] == JOB_ID
    assert service.requests[0].json["spec"] == {"preset": "of-tomorrow", "unknown": 1e-6}


def test_overrides_reach_into_lists_of_the_preset_as_they_do_for_train(service: Service) -> None:
    service.on("POST /v1/jobs", reply(job("queued"), 201))
    invoke(service, "submit", QUICKSTART, "--set", "data.train.0.limit=5")
    assert service.requests[0].json["spec"]["data"]["train"] == [{"path": "builtin:addition", "limit": 5}]


def test_every_problem_that_the_service_found_is_shown(service: Service) -> None:
    errors = [{"param": "steps", "detail": "steps must be >= 1, got 0"}, {"param": "stepz", "detail": "no such key"}]
    service.on("POST /v1/jobs", problem(422, "invalid_job", "the job has 2 problems", errors=errors))
    result = invoke(service, "submit", QUICKSTART)
    assert result.exit_code == 2
    assert "error: the job has 2 problems\n  - steps: steps must be >= 1, got 0\n" in result.stderr


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ("succeeded", 0, f"sapo-ray export {JOB_ID} FOLDER"),
        ("failed", 1, f"sapo-ray logs {JOB_ID}"),
        ("cancelled", 3, "cancelled: as it is"),
        ("paused", 4, f"sapo-ray resume {JOB_ID}"),
    ],
)
def test_the_exit_code_of_wait_tells_how_the_job_ended(state: str, code: int, said: str, service: Service) -> None:
    service.on("POST /v1/jobs", reply(job("queued"), 201))
    tells(service, end(state), state=state)
    result = invoke(service, "submit", QUICKSTART, "--wait")
    assert result.exit_code == code, result.stderr
    assert result.stdout.splitlines()[0] == JOB_ID
    assert said in result.stdout


@pytest.mark.parametrize(
    ("asked", "state", "code"),
    [
        ("pause", "paused", 0),
        ("pause", "succeeded", 0),
        ("pause", "failed", 1),
        ("pause", "cancelled", 3),
        ("cancel", "cancelled", 0),
        ("cancel", "succeeded", 0),
        ("cancel", "failed", 1),
    ],
)
def test_waiting_for_what_was_asked_for_is_0_if_it_came(asked: str, state: str, code: int, service: Service) -> None:
    service.on(f"POST {ONE}:{asked}", reply(job(), 202))
    tells(service, end(state), state=state)
    result = invoke(service, asked, JOB_ID, "--wait")
    assert result.exit_code == code, result.stderr


@pytest.mark.parametrize("command", [("watch", JOB_ID), ("submit", QUICKSTART, "--wait"), ("get", JOB_ID)])
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (problem(401, "unauthenticated", "no such key"), 2),
        (problem(404, "not_found", "no such job"), 2),
        (problem(500, "internal", "a bug"), 5),
        (Answer(200, {"content-type": "text/html"}, [b"<html>log in</html>"]), 5),
    ],
)
def test_a_command_that_was_refused_is_told_from_one_without_a_service_and_from_a_job_that_failed(
    command: tuple[str, ...], answer: Answer, code: int, service: Service
) -> None:
    service.on("POST /v1/jobs", answer)
    service.on(f"GET {ONE}", answer)
    result = invoke(service, *command)
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ")


def texts(value: Any) -> list[str]:
    """All texts in what JSON held."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in texts(one)]


def test_what_others_wrote_steers_no_terminal(service: Service) -> None:
    evil = "\x9b2J\x1b]0;owned\x07"
    shown = job("failed", reason=evil) | {"name": evil, "labels": {"team": evil}}
    shown["status"]["conditions"] = [{"type": evil, "reason": evil, "since": "2026-01-01T00:00:00Z", "step": 1}]
    service.on("GET /v1/jobs", listed(shown))
    service.on(f"GET {ONE}", reply(shown))
    service.on(f"GET {ONE}/events", listed(event(1, "transition", state="failed", reason=evil)))
    service.on(f"GET {ONE}/samples", listed({"step": 1, "verdict": evil, "prompt": evil, "completion": evil}))
    service.on(f"GET {ONE}/logs", listed({"name": evil, "bytes": 1}))
    service.on(f"POST {ONE}:pause", problem(409, "illegal_transition", evil))
    for command in (("jobs",), ("get",), ("watch",), ("samples",), ("logs",), ("pause",)):
        result = invoke(service, *command, *(() if command == ("jobs",) else (JOB_ID,)))
        printed = result.stdout + result.stderr
        assert r"\x9b2J\x1b" in "".join(printed.split()), (command, printed)
        assert not set(printed) & {"\x1b", "\x9b", "\x07"}, command
    for command in (("get", JOB_ID), ("watch", JOB_ID), ("samples", JOB_ID), ("logs", JOB_ID)):
        printed = invoke(service, *command, "--json").stdout
        assert not set(printed) & {"\x1b", "\x9b", "\x07"}, command
        assert evil in texts(json.loads(printed)), command


def test_a_log_on_a_terminal_is_without_control_characters(service: Service) -> None:
    text = b"\x1b[36m(pid=1)\x1b[0m one\r\ntwo \x1b]0;owned\x07\n"
    parts = [Answer(200, {"x-next-offset": str(end)}, [text[start:end]]) for start, end in ((0, 4), (4, len(text)))]
    service.on(f"GET {ONE}/logs/driver-1", *parts, Answer(200, {"x-next-offset": str(len(text))}))
    assert invoke(service, "logs", JOB_ID, "driver-1").stdout_bytes == text
    service.on(f"GET {ONE}/logs/driver-1", *parts, Answer(200, {"x-next-offset": str(len(text))}))
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "sapo_ray.cli", "logs", JOB_ID, "driver-1"]
    environment = {**os.environ, "SAPO_URL": service.url, "SAPO_API_KEY": "k"}
    subprocess.run(command, env=environment, stdout=terminal, check=True, timeout=60)
    assert os.read(controller, 4096) == b"(pid=1) one\r\ntwo \\x1b]0;owned\\x07\r\n"
    os.close(controller)
    os.close(terminal)


def test_watching_shows_what_train_shows(service: Service) -> None:
    tells(service, end("succeeded"), state="succeeded", result=RESULT)
    result = invoke(service, "watch", JOB_ID)
    assert result.exit_code == 0
    assert "queued: submitted\nstarting\ntraining ...\n2/2  reward 0.750\n" in result.stdout
    assert "step 2: held-out accuracy 0.953\nnote: one update [per] step\n" in result.stdout
    assert "going on from step 0 (no checkpoint)" in result.stdout
    assert "event 8 (evaluation) cannot be shown: KeyError('greedy')" in result.stdout
    assert "0.900 [0.800, 0.950]" in result.stdout
    assert f"{JOB_ID} succeeded: as it is" in result.stdout


def test_watching_as_json_prints_every_event_once(service: Service) -> None:
    tells(service, end("cancelled"), state="cancelled")
    result = invoke(service, "watch", JOB_ID, "--json")
    assert result.exit_code == 3
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == list(range(1, 10))


def test_jobs_stand_in_80_columns_with_their_ids_whole(service: Service) -> None:
    figures = {"reward": 0.5, "accuracy": 0.953}
    service.on("GET /v1/jobs", listed(job(summary=figures), job("queued", position=3) | {"name": "x" * 40}))
    result = invoke(service, "jobs", "--state", "running", "--label", "team=a")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stdout.count(JOB_ID) == 2
    assert "0.953" in result.stdout
    assert "queued #3" in result.stdout
    assert service.requests[0].query == "state=running&label=team%3Da&limit=20"
    assert len(json.loads(invoke(service, "jobs", "--json").stdout)) == 2


def test_ids_of_keys_stand_whole_in_80_columns(service: Service) -> None:
    key = {"id": "key-3n2x7xvi3obg2h7elshw", "name": "a key of some length", "tenant": "research", "scopes": ["read"]}
    made = {"prefix": "sapo_d7fd0K_", "created_at": "2026-01-01T00:00:00Z", "expires_at": None, "revoked_at": None}
    service.on("GET /v1/api-keys", listed(key | made))
    assert "key-3n2x7xvi3obg2h7elshw " in invoke(service, "keys", "list").stdout


def test_one_job_is_shown_with_its_conditions(service: Service) -> None:
    condition = {"type": "StaleDrops", "reason": "2% of [groups]", "since": "2026-01-01T00:00:00Z", "step": 4}
    service.on(f"GET {ONE}", reply(job(conditions=[condition], summary={"workers": 2})))
    result = invoke(service, "get", JOB_ID)
    assert "2 now; 2 wanted of 1 to 4" in result.stdout
    assert "2% of [groups]" in result.stdout
    assert json.loads(invoke(service, "get", JOB_ID, "--json").stdout)["status"]["state"] == "running"


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (("pause", JOB_ID), f"POST {ONE}:pause"),
        (("resume", JOB_ID), f"POST {ONE}:resume"),
        (("cancel", JOB_ID), f"POST {ONE}:cancel"),
        (("cancel", JOB_ID, "--discard"), f"POST {ONE}:cancel?discard=true"),
        (("checkpoint", JOB_ID), f"POST {ONE}:checkpoint"),
    ],
)
def test_steering_asks_for_one_thing(arguments: tuple[str, ...], request_: str, service: Service) -> None:
    service.on(request_.partition("?")[0], reply(job(), 202))
    assert invoke(service, *arguments, "--json").exit_code == 0
    (asked,) = service.requests
    assert f"{asked.method} {asked.path}{'?' if asked.query else ''}{asked.query}" == request_


def test_resuming_takes_a_run_directory_or_a_job_id(service: Service, tmp_path: Path) -> None:
    result = invoke(service, "resume", str(tmp_path))
    assert (result.exit_code, service.requests) == (1, [])
    assert "it has no spec.json" in result.stderr
    result = invoke(service, "resume", JOB_ID, "--set", "steps=3")
    assert result.exit_code == 2
    assert service.requests == []


def test_what_the_state_does_not_permit_is_one_line(service: Service) -> None:
    service.on(f"POST {ONE}:pause", problem(409, "illegal_transition", "a job that is failed does not permit :pause"))
    result = invoke(service, "pause", JOB_ID)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: a job that is failed does not permit :pause (POST {ONE}:pause: 409 illegal_transition)\n"
    )


def test_scaling_sends_bounds_that_hold_the_target(service: Service) -> None:
    service.on(f"GET {ONE}/scale", reply({"min": 1, "max": 2, "target": 2}))
    service.on(f"PUT {ONE}/scale", lambda request: reply(request.json))
    assert invoke(service, "scale", JOB_ID, "5").stdout == "5 rollout workers wanted, of 1 to 5\n"
    assert invoke(service, "scale", JOB_ID).stdout == "2 rollout workers wanted, of 1 to 2\n"


def test_scaling_shows_how_many_workers_there_are(service: Service) -> None:
    counted = {"wanted": 3, "ready": 0, "starting": 2, "pending": 1, "draining": 0, "given_up": 0}
    service.on(f"GET {ONE}/scale", reply({"min": 1, "max": 4, "target": 3, "observed": counted}))
    assert invoke(service, "scale", JOB_ID).stdout == (
        "3 rollout workers wanted, of 1 to 4; the driver aims at 3: 0 ready, 2 starting, 1 pending\n"
    )


def test_samples_are_of_the_newest_step(service: Service) -> None:
    service.on(f"GET {ONE}", reply(job(step=7)))
    row = {"step": 7, "group": "g", "i": 0, "prompt": "1+1=", "completion": "[b]2", "gold": "2", "verdict": "correct"}
    service.on(f"GET {ONE}/samples", listed(row | {"reward": 1.0}))
    result = invoke(service, "samples", JOB_ID)
    assert service.requests[1].query == "step=7&limit=8"
    assert "completion [b]2" in result.stdout
    assert "reward 1" in result.stdout


def test_logs_are_listed_and_printed_byte_for_byte(service: Service) -> None:
    service.on(f"GET {ONE}/logs", listed({"name": "rollout-0.log", "bytes": 12, "modified_at": None}))
    assert "rollout-0.log" in invoke(service, "logs", JOB_ID).stdout
    text = "grüße\n".encode()
    cut = Answer(200, {"x-next-offset": "3"}, [text[:3]]), Answer(200, {"x-next-offset": "8"}, [text[3:]])
    service.on(f"GET {ONE}/logs/rollout-0.log", *cut, Answer(200, {"x-next-offset": "8"}))
    assert invoke(service, "logs", JOB_ID, "rollout-0.log").stdout == "grüße\n"
    assert [one.query for one in service.asked(f"GET {ONE}/logs/rollout-0.log")] == ["offset=0", "offset=3", "offset=8"]


def test_following_a_log_ends_with_the_job(service: Service) -> None:
    service.on(f"GET {ONE}", reply(job()), reply(job("succeeded")))
    nothing = Answer(200, {"x-next-offset": "2"})
    last = Answer(200, {"x-next-offset": "4"}, [b"b\n"])
    service.on(f"GET {ONE}/logs/driver-1", Answer(200, {"x-next-offset": "2"}, [b"a\n"]), nothing, last, nothing)
    assert invoke(service, "logs", JOB_ID, "driver-1", "-f", "--tail", "1").stdout == "a\nb\n"
    assert service.asked(f"GET {ONE}/logs/driver-1")[0].query == "offset=-1024"


def test_data_and_keys_go_to_the_service(service: Service, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1+1=", "answer": "2"}\n')
    made = {"id": "ds-1", "name": "rows.jsonl", "format": "jsonl", "rows": 1, "bytes": 36, "sha256": "0" * 64}
    made |= {"columns": ["question", "answer"], "created_at": "2026-01-01T00:00:00Z"}
    service.on("POST /v1/datasets", problem(503, "unavailable", "busy", {"retry-after": "0"}), reply(made, 201))
    result = invoke(service, "datasets", "upload", str(data))
    assert "path: dataset:ds-1" in result.stdout
    first, second = service.asked("POST /v1/datasets")
    assert (first.body, first.query) == (data.read_bytes(), "name=rows.jsonl&format=jsonl")
    assert second.body == first.body
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert first.headers["content-type"] == "application/jsonl"

    key = {"id": "key-1", "name": "ci", "tenant": "default", "scopes": ["read"], "prefix": "sapo_ab"}
    service.on("POST /v1/api-keys", reply(key | {"created_at": "2026-01-01T00:00:00Z", "secret": "sapo_s"}, 201))
    assert invoke(service, "keys", "create", "ci", "--scope", "read").stdout == "sapo_s\n"
    assert service.requests[-1].json == {"name": "ci", "scopes": ["read"]}


def test_a_file_of_unknown_kind_is_not_sent(service: Service, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    result = invoke(service, "datasets", "upload", str(tmp_path / "rows.csv"))
    assert result.exit_code == 2
    assert ".jsonl or .parquet" in result.stderr
    assert service.requests == []


def test_a_missing_key_and_a_missing_service_are_one_clear_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAPO_API_KEY", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        alone = CliRunner(env={"SAPO_URL": url}).invoke(app, ["jobs"])
        assert (alone.exit_code, alone.stderr.count("\n")) == (2, 1)
        assert "no API key" in alone.stderr
        assert "SAPO_API_KEY" in alone.stderr
        result = CliRunner(env={"SAPO_URL": url, "SAPO_API_KEY": "k"}).invoke(app, ["jobs"])
        assert (result.exit_code, result.stderr.count("\n")) == (5, 1)
        assert f"no service at {url}" in result.stderr


def test_ctrl_c_ends_the_watching_and_says_that_the_job_goes_on(service: Service) -> None:
    service.on(f"GET {ONE}", reply(job()))
    beats = Answer(200, {"content-type": "text/event-stream"}, [b": alive\n\n"] * 600, pause_s=0.1)
    service.on(f"GET {ONE}/events", beats)
    watching = subprocess.Popen(
        [sys.executable, "-m", "sapo_ray.cli", "watch", JOB_ID],
        env={**os.environ, "SAPO_URL": service.url, "SAPO_API_KEY": "k"},
        stderr=subprocess.PIPE,
        text=True,
    )
    bound = time.monotonic() + 60
    while not service.asked(f"GET {ONE}/events"):
        assert time.monotonic() < bound
        time.sleep(0.05)
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert f"{JOB_ID} goes on" in said
    assert "Traceback" not in said


def test_help_loads_no_engine_and_no_http_library() -> None:
    code = "import sys; from sapo_ray.cli import app; app(['submit', '--help'], standalone_mode=False);"
    code += "print(sorted({'httpx', 'torch', 'ray', 'fastapi', 'sapo_ray.config.spec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
