"""What clients do beneath HTTP: heads without end, bodies that stop, connections that are hung up."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from api_server import ADMIN_KEY, ServerProcess

from sapo_ray.control import edge, http

POST = (
    f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
    "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    patience = {"API_SERVER_PATIENCE_S": "3"}
    with ServerProcess(folder, f"sqlite:///{folder / 'control.db'}", SAPO_LOG_LEVEL="debug", **patience) as server:
        yield server


def test_a_head_and_the_next_part_of_a_body_are_waited_for_half_a_minute() -> None:
    assert (http.HEAD_S, edge.BODY_S) == (30, 30)


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
        assert b"nothing more of the body came for 3 s" in answer
        assert (half.recv(100), silent.recv(100)) == (b"", b"")


def test_a_client_that_hangs_up_is_no_error(server: ServerProcess) -> None:
    with connected(server) as client:
        client.sendall(POST)
        time.sleep(0.2)
    end = time.monotonic() + 30
    while "client_gone" not in server.log:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "unhandled" not in server.log
    assert "Traceback" not in server.log
