"""Where a server listens."""

from __future__ import annotations

import socket

from kitae.errors import PortError


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Bound before anything is loaded, so that no one takes it meanwhile."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise PortError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port, or 0 for a free one"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where it answers, without /v1."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
