"""What the launcher's errors say: enough for the operator's log, and no password."""

from __future__ import annotations

import http.server
import threading

import pytest

from sapo_ray.control import launcher
from sapo_ray.control.launcher import LauncherUnavailable, RayJobs


def test_an_address_with_a_password_is_told_without_it() -> None:
    with RayJobs("http://operator:hunter2@127.0.0.1:1") as jobs, pytest.raises(LauncherUnavailable) as caught:
        jobs.ping()
    assert "http://127.0.0.1:1" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "operator" not in str(caught.value)


class Talkative(http.server.BaseHTTPRequestHandler):
    """A dashboard whose logs have a hundred characters."""

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        body = b'{"logs": "' + b"x" * 100 + b'"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_log_that_is_larger_than_the_bound_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Talkative)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with RayJobs(f"http://127.0.0.1:{server.server_port}") as jobs:
            assert jobs.logs("sapo-1") == "x" * 100
            monkeypatch.setattr(launcher, "MOST_LOG_BYTES", 50)
            with pytest.raises(LauncherUnavailable, match="more than 50 bytes"):
                jobs.logs("sapo-1")
    finally:
        server.shutdown()
        server.server_close()
