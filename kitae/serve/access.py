"""Who may ask: one bearer token, kept in a file that only its owner can read."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from kitae.errors import ConfigError

TOKEN_BYTES = 32


def read_key(path: Path) -> str:
    """The token of a file, whose first line it is; one that others can read is refused."""
    try:
        mode = path.stat().st_mode
        key = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except FileNotFoundError as error:
        raise ConfigError(
            f"--api_key_file: there is no {path}; write a token into it, or leave the flag out: the server makes one"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file: cannot read {path}: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"--api_key_file: others can read {path}; run: chmod 600 {path}")
    return checked(key, where=str(path))


def checked(key: str, *, where: str) -> str:
    """The token, if a header can carry it."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the token in {where} is empty or has characters that a header cannot carry")
    return key


def new_key() -> str:
    """32 random bytes as text."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def write_private(path: Path, content: str) -> None:
    """Write a file that only its owner can read, under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # no one else's, nor a link
    with open(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o600)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, path)


class Gate:
    """Compares tokens in a time that says nothing about the right one."""

    def __init__(self, key: str) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()

    def admits(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header carries the token; any bytes may come."""
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == b"bearer"
