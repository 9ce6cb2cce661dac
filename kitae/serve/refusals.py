"""What a request is answered that cannot be served, in the shape OpenAI's clients read.

The clients turn the status into an exception of their own: 400 BadRequestError, 401 AuthenticationError, 404
NotFoundError, 429 RateLimitError, which they repeat after Retry-After.
"""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """One request cannot be served; others go on."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """`param` names the field at fault."""
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON answer."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What the answer carries besides."""
        found = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
