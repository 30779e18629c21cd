"""What a server on this machine may do to a request: redirect it, answer slowly, without end, or with anything."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from stemma.decode import json_client
from stemma.decode.json_client import JsonClient
from stemma.errors import ServerError


@contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads a request and lets `answer` do the rest; its address, and the requests so far."""
    requests: list[bytes] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection = server.accept()[0]
                with connection, suppress(OSError):
                    requests.append(connection.recv(65536))
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", requests
        server.shutdown(socket.SHUT_RDWR)


def sending(text: str) -> Callable[[socket.socket], object]:
    return lambda connection: connection.sendall(text.encode())


def trickling(start: bytes) -> Callable[[socket.socket], object]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            time.sleep(0.02)
            connection.sendall(b"a")

    return answer


def post(url: str, **options: object) -> dict[str, object]:
    return JsonClient(**{"url": url, "retries": 0, "timeout": 10.0, "api_key": "secret", **options}).post(
        "/p", {"a": 1}
    )


def test_an_answer_is_read() -> None:
    with listening(sending('HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"b": 2}')) as (url, requests):
        assert post(f"{url}/base") == {"b": 2}
    assert requests[0].startswith(b"POST /base/p HTTP/1.1")
    assert b"Authorization: Bearer secret" in requests[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_refused_and_the_key_goes_nowhere_else(status: int) -> None:
    with listening(sending("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")) as (elsewhere, leaked):
        head = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere}/x\r\nContent-Length: 0\r\n\r\n"
        with listening(sending(head)) as (url, _), pytest.raises(ServerError, match=f"redirects to '{elsewhere}/x'"):
            post(url)
    assert leaked == []


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\nX: ", b'HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{"b": "']
)
def test_a_trickle_of_bytes_does_not_outlast_the_deadline(start: bytes) -> None:
    began = time.monotonic()
    with listening(trickling(start)) as (url, _), pytest.raises(ServerError, match=r"within timeout=0\.3 seconds"):
        post(url, timeout=0.3)
    assert time.monotonic() - began < 5


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_client, "_MAX_BYTES", 10_000)

    def flood(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" " * 4096)

    with listening(flood) as (url, _), pytest.raises(ServerError, match="more than 10000 bytes"):
        post(url)


@pytest.mark.parametrize("text", ["\r\n", "SSH-2.0\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", ""])
def test_what_is_not_http_is_one_message(text: str) -> None:
    with listening(sending(text)) as (url, requests), pytest.raises(ServerError, match=r"no connection to .* in 1 att"):
        post(url)
    assert len(requests) == 1


@pytest.mark.parametrize(
    "options",
    [
        *({"url": url} for url in ("http://", "http://a:port", "http://a:99999", "http://u:p@a", "ftp://a")),
        *({"api_key": key} for key in ("a\nb", "ä")),
        *({"timeout": seconds} for seconds in (0, -1, float("nan"), float("inf"))),
    ],
    ids=str,
)
def test_options_that_no_request_can_have_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"url|api_key|timeout|[Pp]ort"):
        JsonClient(**{"url": "http://localhost", **options})
