"""Serve a model or run in the background: kitae deploy RUN_OR_MODEL [--name NAME], which prints its URL and token."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kitae.cli._endpoint import SAID, text_of
from kitae.cli._open import warn_on_stderr
from kitae.cli.serve import Settings
from kitae.errors import ConfigError, KitaeError, LockedError, PortError
from kitae.settings import read

if TYPE_CHECKING:
    from kitae.jobs.endpoints import Endpoint

USAGE = """usage: kitae deploy RUN_OR_MODEL [--name NAME] [--no_wait] [any flag of kitae serve]

Starts kitae serve in the background, where it outlives this terminal, and prints URL and token when it answers.
The port is a free one unless --port says otherwise.

  --name NAME   what kitae endpoints calls it; default: the model's name
  --no_wait     return at once; kitae endpoints info NAME tells when it runs

See kitae serve --help for the other flags, and kitae endpoints for what is running."""
ITS_OWN = ("api_key", "api_key_file", "ready_file")
"""Flags of kitae serve that deploy sets itself."""


def main(argv: list[str]) -> int:
    """Start an endpoint, wait until it answers, and say where it is."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    name, is_waiting, words = _own_flags(argv)
    use, notes = read("serve", Settings, words, positional=("model",))
    warn_on_stderr(notes.warnings)
    for flag in ITS_OWN:
        if flag in notes.origins:
            raise ConfigError(f"--{flag}: kitae deploy makes a token and files of its own; leave it out")
    if "port" not in notes.origins:
        words += ["--port", "0"]

    from kitae.jobs import endpoints

    endpoint = endpoints.deploy(words, model=use.model, grace_s=use.grace_s, name=name)
    print(
        f"endpoint {endpoint.name} is starting; its log is {endpoint.job.folder / 'output.log'}",
        file=sys.stderr,
    )
    if is_waiting:
        _wait(endpoint)
        print(text_of(endpoint))
    return 0


def _own_flags(argv: Sequence[str]) -> tuple[str | None, bool, list[str]]:
    """(name, whether to wait, the words for kitae serve)."""
    name, is_waiting, words = None, True, list(argv)
    rest = []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag == "--name":
            if not equals and not words:
                raise ConfigError("--name needs a value; leave it out to use the model's name")
            name = value if equals else words.pop(0)
        elif word in ("--no_wait", "--no-wait"):
            is_waiting = False
        else:
            rest.append(word)
    return name, is_waiting, rest


def _wait(endpoint: Endpoint) -> None:
    """Until it answers; the time it takes is shown on a terminal. Ctrl-C leaves it running."""
    from kitae.jobs import endpoints

    begun = time.monotonic()

    def show() -> None:
        if sys.stderr.isatty():
            print(
                f"\r{endpoint.state()} {time.monotonic() - begun:.0f} s", end="", file=sys.stderr, flush=True
            )

    try:
        state = endpoints.wait(endpoint, tick=show)
    except KeyboardInterrupt:
        print(
            f"\nkitae: endpoint {endpoint.name} goes on; kitae endpoints stop {endpoint.name} ends it",
            file=sys.stderr,
        )
        raise
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
    if state == "running":
        return
    said = "; ".join(line.strip().removeprefix(SAID) for line in endpoint.job.log_tail(3) if line.strip())
    error = KitaeError(f"endpoint {endpoint.name} {state} while it was loading: {said or 'it said nothing'}")
    code = (endpoint.job.end() or {}).get("code")
    if code in (PortError.exit_code, LockedError.exit_code):  # what a script may wait for and try again
        error.exit_code = code
    raise error
