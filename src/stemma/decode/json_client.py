"""JSON over HTTP with the standard library: one POST, retried while no connection comes about."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from stemma.errors import ServerError

_RETRY_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonClient:
    """A server and how to talk to it.

    Attributes:
        url: its root, without a slash at the end.
        api_key: sent as bearer token.
        timeout: seconds that an answer may take.
        retries: how often a request is sent again after a failed connection.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    retries: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        if not self.timeout > 0:
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
            ServerError: no connection, no answer in time, an HTTP error, or an answer that is no JSON object.
        """
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        text = self._send(request, hint)
        try:
            answer = json.loads(text) if text.strip() else {}
        except json.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerError(f"{request.full_url} answered with something else than a JSON object: {text[:500]!r}")
        return answer

    def _send(self, request: urllib.request.Request, hint: str) -> str:
        failure: object = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(_RETRY_SECONDS * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read().decode(errors="replace")
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")
                raise ServerError(
                    f"{request.full_url} answered HTTP {error.code} {error.reason}: {text[:500]}{hint}"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                failure = error.reason if isinstance(error, urllib.error.URLError) else error
                if isinstance(failure, TimeoutError):
                    raise ServerError(
                        f"{request.full_url} did not answer within timeout={self.timeout} seconds; raise timeout, or "
                        "have fewer requests under way at a time"
                    ) from error
        raise ServerError(
            f"no connection to {request.full_url} in {self.retries + 1} attempts ({failure}); is the server running, "
            "and is the address right?"
        )
