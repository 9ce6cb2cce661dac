"""A chat with a model behind an OpenAI-compatible address: one streamed request a turn, on the standard library alone.

turns --POST /v1/chat/completions, stream--> server-sent events --> pieces of text, the thinking between <think> tags
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

from kitae.errors import EndpointError

TIMEOUT_S = 600.0
"""So long a server may be silent."""


class Remote:
    """One model of one endpoint."""

    def __init__(self, endpoint: str, *, token: str | None, model: str | None = None) -> None:
        """`endpoint` may end in /v1 or not; without `model` the endpoint's first one is taken."""
        try:
            url = urllib.parse.urlsplit(endpoint.rstrip("/").removesuffix("/v1"))
            is_whole = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:  # a port that is no number, a bracket that is not closed
            is_whole = False
        if not is_whole:
            raise EndpointError(
                f"--endpoint is {endpoint!r}; write its address, such as http://127.0.0.1:8000"
            )
        self._url, self._token = url, token
        self._shown = urllib.parse.urlunsplit(url)
        self.model = model or self._first_model()

    def stream(self, messages: list[dict[str, str]], **fields: Any) -> Iterator[str]:
        """The answer's text as it comes; closing the iterator ends the request."""
        body = {"model": self.model, "messages": messages, "stream": True, **fields}
        thinks = False
        with contextlib.closing(self._request("POST", "/v1/chat/completions", body)) as response:
            for event in _events(response):
                if "error" in event:
                    raise EndpointError(f"{self._shown} failed: {_message(event)}")
                for choice in event.get("choices", ()):
                    delta = choice.get("delta") or {}
                    reasoning = delta.get("reasoning_content") or delta.get("reasoning")
                    content = delta.get("content")
                    if reasoning:
                        yield reasoning if thinks else f"<think>\n{reasoning}"
                        thinks = True
                    if content:
                        yield f"\n</think>\n\n{content}" if thinks else content
                        thinks = False
        if thinks:
            yield "\n</think>\n\n"

    def _first_model(self) -> str:
        with contextlib.closing(self._request("GET", "/v1/models")) as response:
            listed = _read_json(response.read(1 << 20))
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{self._shown}/v1/models names no model; name one after kitae chat"
            ) from error

    def _request(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        assert self._url.hostname is not None, self._url
        connection = kind(self._url.hostname, self._url.port, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request(
                method, self._url.path + path, None if body is None else json.dumps(body), headers
            )
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EndpointError(
                f"{self._shown} cannot be reached: {error}; is the server running?"
            ) from error
        if response.status != 200:
            reason = _message(_read_json(response.read(1 << 16)))
            connection.close()
            hint = "; give its token with --token or --token_file" if response.status == 401 else ""
            raise EndpointError(f"{self._shown} answers {response.status}: {reason}{hint}")
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, until [DONE]."""
    try:
        for line in response:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:"):
                continue
            if data == b"[DONE]":
                return
            yield _read_json(data)
    except (OSError, http.client.HTTPException) as error:
        raise EndpointError(f"the connection broke off in the middle of an answer: {error}") from error
    raise EndpointError("the server broke the answer off in the middle")


def _read_json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise EndpointError(f"the server's answer is not JSON: {content[:80]!r}") from error
    if not isinstance(found, dict):
        raise EndpointError(f"the server's answer is no JSON object: {content[:80]!r}")
    return found


def _message(body: dict[str, Any]) -> str:
    error = body.get("error", body)
    return str(error.get("message", error) if isinstance(error, dict) else error)
