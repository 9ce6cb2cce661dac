"""Where a model is asked over HTTP: the address, the key, and how patiently."""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kitae.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model is asked, and how patiently."""

    base_url: str
    """As clients of OpenAI's have it, such as http://localhost:8000/v1."""
    model: str
    """The model's name there."""
    api_key: str | None = None
    """Sent as a bearer token; never written anywhere, and masked in what the server says."""
    timeout_s: float = 600.0
    """Limit for one whole answer."""
    max_attempts: int = 6
    """How often one request is tried."""
    retry_wait_s: float = 1.0
    """Wait after the first failed attempt; it doubles each time, up to a minute, give or take a half."""
    longest_wait_s: float = 300.0
    """A server that asks (Retry-After) to be left alone for longer ends the run."""
    extra_body: Mapping[str, Any] | None = None
    """More fields of each request, over ours; null leaves one of ours out. JSON values of every shape."""

    def __repr__(self) -> str:
        return f"Endpoint({self.model} at {self.base_url})"


def chat_url(base_url: str) -> str:
    """The address requests go to."""
    try:
        parts = urllib.parse.urlsplit(base_url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or any(c.isspace() for c in base_url):
        raise ConfigError(
            f"base_url is {base_url!r}; it starts with http:// or https://, such as http://localhost:8000/v1"
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError("base_url holds a name or password; name the variable of the key with api_key_env")
    if parts.query or parts.fragment:
        raise ConfigError(f"base_url is {base_url!r}; leave out what comes after ? or #")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, f"{path}/chat/completions", "", ""))


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def usable_key(key: str) -> str:
    key = key.strip()
    if not key.isascii() or not key.isprintable() or not key:
        raise ConfigError(
            "the API key is empty or has characters that no key has; check its variable (api_key_env)"
        )
    return key
