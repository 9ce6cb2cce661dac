"""Around the routes: who is let in, and that every failure is answered in OpenAI's shape."""

from __future__ import annotations

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kitae.serve.access import Gate
from kitae.serve.answering import ClientGone
from kitae.serve.answers import to_json
from kitae.serve.metrics import Metrics
from kitae.serve.refusals import Refusal

log = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)
PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics")


class Guard:
    """The outermost layer: lets in who has the token, and gives every failure OpenAI's shape."""

    def __init__(self, app: ASGIApp, *, gate: Gate, metrics: Metrics) -> None:
        self._app, self._gate, self._metrics = app, gate, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        status = 0

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # A client told of an address with a slash at its end asks for //v1/models.
        scope = dict(scope, path="/" + scope["path"].lstrip("/"))
        try:
            self._admit(scope)
            await self._app(scope, receive, counting)
        except (ClientGone, ClientDisconnect):
            status = 499  # nobody reads it; the name is nginx's
        except Refusal as refusal:
            await refuse(refusal)(scope, receive, counting)
        except Exception as error:
            log.exception("a request failed", exc_info=error)
            if not status:
                await (await failed(Request(scope), error))(scope, receive, counting)
        finally:
            self._metrics.requests.labels(_known_path(scope["path"]), str(status)).inc()

    def _admit(self, scope: Scope) -> None:
        if scope["path"] in OPEN_PATHS:
            return
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(headers) != 1 or not self._gate.admits(headers[0]):
            raise Refusal(
                "this needs the server's token: Authorization: Bearer TOKEN",
                status=401,
                code="invalid_api_key",
            )


async def http_error(request: Request, error: Exception) -> Response:
    """What Starlette found: no such path, or another method."""
    assert isinstance(error, HTTPException), error
    reason = {404: "there is nothing at", 405: "this method is not allowed at"}.get(
        error.status_code, error.detail
    )
    return refuse(Refusal(f"{reason} {request.url.path}", status=error.status_code))


async def failed(_request: Request, _error: Exception) -> Response:
    """An error of ours."""
    return refuse(Refusal("the server failed; its log says why", status=500))  # Guard writes it there


async def handled(_request: Request, error: Exception) -> Response:
    """A Refusal."""
    assert isinstance(error, Refusal), error
    return refuse(error)


def refuse(refusal: Refusal) -> Response:
    """The answer to a request that cannot be served."""
    return as_json(refusal.body(), status=refusal.status, headers=refusal.headers())


def as_json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(to_json(value), status_code=status, headers=headers, media_type="application/json")


def _known_path(path: str) -> str:
    """A label with few values, whatever is asked for."""
    return path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
