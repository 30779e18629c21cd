"""JSON over HTTP with the standard library: one POST, retried while no connection comes about.

Requests go to the server that was named and nowhere else: redirects are refused, proxies of the environment not used.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from stemma.errors import ServerError

__all__ = ["JsonClient"]

_RETRY_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one."""
_MAX_BYTES = 64 * 2**20
"""Of an answer; a token takes some forty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonClient:
    """A server and how to talk to it.

    Attributes:
        url: its root, without a slash at the end.
        api_key: sent as bearer token.
        timeout: seconds that an answer may take, from the connection to its last byte.
        retries: how often a request is sent again after a failed connection.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    retries: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        address = urlsplit(self.url)
        if not address.hostname or "@" in address.netloc or address.port == 0:  # a port that is none raises here
            raise ValueError(f"url must name a host, and a port where it has one, and no user; got {self.url!r}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII on one line")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, got {self.retries}")

    def post(self, path: str, body: dict[str, Any], *, hint: str = "") -> dict[str, Any]:
        """The JSON object that the server answers with; {} for an empty answer.

        Args:
            path: from the root, with a slash in front.
            body: what to send.
            hint: what to do when the server refuses; ends the error message.

        Raises:
            ServerError: no connection, no answer in time, too long an answer, a redirect, an HTTP error, or an answer
                that is no JSON object.
        """
        failure: object = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(_RETRY_SECONDS * 2 ** (attempt - 1))
            try:
                text = self._send(path, json.dumps(body).encode(), hint)
                break
            except (OSError, http.client.HTTPException) as error:
                failure = error
        else:
            raise ServerError(
                f"no connection to {self.url}{path} in {self.retries + 1} attempts ({failure}); is the server running, "
                "and is the address right?"
            )
        try:
            answer = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ServerError(f"{self.url}{path} answered with something else than a JSON object: {text[:500]!r}")
        return answer

    def _send(self, path: str, body: bytes, hint: str) -> str:
        """The text of one answer.

        Raises:
            OSError, HTTPException: the connection failed.
            ServerError: anything else.
        """
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.netloc, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        late = threading.Event()

        def cut_off() -> None:
            late.set()
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, cut_off)
        try:
            connection.connect()
            open_socket = connection.sock
            timer.start()  # a timeout of the socket alone starts anew with every byte
            connection.request("POST", address.path + path, body, headers)
            response = connection.getresponse()
            content = response.read(_MAX_BYTES + 1)
            if response.length and len(content) <= _MAX_BYTES:
                raise http.client.IncompleteRead(content, response.length)
        except (OSError, http.client.HTTPException) as error:
            if not late.is_set() and not isinstance(error, TimeoutError):
                raise
            late.set()
        finally:
            timer.cancel()
            connection.close()
        where = f"{self.url}{path}"
        if late.is_set():
            raise ServerError(
                f"{where} did not answer within timeout={self.timeout} seconds; raise timeout, or have fewer requests "
                "under way at a time"
            )
        if len(content) > _MAX_BYTES:
            raise ServerError(f"{where} answered with more than {_MAX_BYTES} bytes; is it the server that was meant?")
        text = content.decode(errors="replace")
        if 300 <= response.status < 400:
            to = response.getheader("Location")
            raise ServerError(
                f"{where} redirects to {to!r}, which is not followed; give the address of the server itself"
            )
        if not 200 <= response.status < 300:
            raise ServerError(f"{where} answered HTTP {response.status} {response.reason}: {text[:500]}{hint}")
        return text
