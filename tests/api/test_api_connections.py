"""What clients do beneath HTTP: heads without end, bodies that stop, connections that are hung up."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import ADMIN_KEY, ServerProcess

POST = (
    f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
    "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
).encode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, f"sqlite:///{tmp_path / 'control.db'}", SAPO_LOG_LEVEL="debug") as server:
        yield server


def connected(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=100)


def test_a_head_without_end_is_refused_and_stalled_heads_and_bodies_are_ended(server: ServerProcess) -> None:
    with connected(server) as stalled, connected(server) as half, connected(server) as silent, connected(server) as big:
        stalled.sendall(POST)
        half.sendall(b"POST /v1/jobs HT")
        big.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ")
        with pytest.raises(OSError):
            big.sendall(b"a" * (64 << 20))
        answer = b""
        while part := stalled.recv(65536):
            answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "stalled"' in answer
        assert (half.recv(100), silent.recv(100)) == (b"", b"")


def test_a_client_that_hangs_up_is_no_error(server: ServerProcess) -> None:
    with connected(server) as client:
        client.sendall(POST)
        time.sleep(0.5)
    end = time.monotonic() + 30
    while "client_gone" not in server.log:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "unhandled" not in server.log
    assert "Traceback" not in server.log
