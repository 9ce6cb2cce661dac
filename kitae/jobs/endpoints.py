"""Endpoints: servers that run as jobs under $KITAE_HOME/endpoints/NAME, each with a token of its own.

    creating -> loading -> running -> stopping -> stopped | failed | lost

The folder is a job's (kitae.jobs.job), and holds besides `token` (only its owner may read it) and ready.json, which the
server writes when it answers requests: its URL and the names of its models.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import secrets
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitae.config import home
from kitae.errors import ConfigError, LockedError
from kitae.jobs.job import ENDED, Job
from kitae.jobs.supervisor import read
from kitae.plugins import did_you_mean

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,80}")
MORE_S = 5.0
"""So much longer than for the answers under way has a server that is asked to end."""
BEFORE_A_JOB = {"token", "alive"}
"""What lies in a folder whose job is about to be started."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server under a supervisor."""

    job: Job

    @property
    def name(self) -> str:
        return self.job.folder.name

    @property
    def token(self) -> str:
        """What requests carry as bearer token."""
        return self.token_file.read_text(encoding="ascii").strip()

    @property
    def token_file(self) -> Path:
        return self.job.folder / "token"

    @property
    def url(self) -> str | None:
        """Where it answers, without /v1; None until it is ready."""
        found: str | None = self.ready().get("url")
        return found

    def ready(self) -> dict[str, Any]:
        """What the server wrote when it was ready; {} until then."""
        return read(self.job.folder / "ready.json") or {}

    def state(self) -> str:
        """creating, loading, running, stopping, stopped, failed or lost."""
        state = self.job.state()
        return "loading" if state == "running" and not self.ready() else state

    def answers(self, *, timeout_s: float = 2.0) -> bool:
        """Whether it answers just now; no proxy is asked."""
        if (url := self.url) is None:
            return False
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{url}/health", timeout=timeout_s) as response:
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def info(self) -> dict[str, Any]:
        """All there is to say, the token left out."""
        facts, process, end = self.job.facts(), self.job.process() or {}, self.job.end()
        state = self.state()
        found = {
            "name": self.name,
            "state": state,
            "model": facts.get("model"),
            "url": self.url,
            "models": self.ready().get("models", []),
            "created": facts.get("created"),
            "pid": process.get("pid"),
            "exit_code": end["code"] if end else None,
            "folder": str(self.job.folder),
            "log": str(self.job.folder / "output.log"),
        }
        if state == "running" and not self.answers():
            found["note"] = "does not answer at the moment"
        if state == "failed":
            found["note"] = _last_words(end["code"] if end else None, self.job.log_tail())
        return found


def _last_words(code: int | None, log: Sequence[str]) -> str:
    """Why a server failed: the signal that ended it, or else the last line that it printed."""
    if code is not None and code < 0:
        cause = ", which the system sends where memory runs out" if -code == signal.SIGKILL else ""
        return f"ended by signal {-code} ({signal.Signals(-code).name}{cause})"
    return next((line for line in reversed(log) if line.strip()), "it said nothing")


def everything() -> list[Endpoint]:
    """All endpoints, also those that have ended, oldest first."""
    folders = (home() / "endpoints").glob("*/job.json")
    found = [Endpoint(Job(path.parent)) for path in folders]
    return sorted(found, key=lambda endpoint: endpoint.job.facts().get("created", 0))


def find(name: str) -> Endpoint:
    """The endpoint of a name."""
    known = {endpoint.name: endpoint for endpoint in everything()}
    if name not in known:
        there = (
            did_you_mean(name, list(known)) if known else "there is none; start one with kitae deploy MODEL"
        )
        raise ConfigError(f"there is no endpoint {name!r}; {there}")
    return known[name]


def deploy(words: Sequence[str], *, model: str, grace_s: float, name: str | None = None) -> Endpoint:
    """Start `kitae serve WORDS` as a job, and return at once. `model` names the endpoint where `name` does not.

    `grace_s` is how long the server lets answers under way finish when it is asked to end.

    A name whose endpoint has ended is used again; one that is alive is refused.
    """
    if name is not None and not NAME.fullmatch(name):
        raise ConfigError(
            f"--name is {name!r}; use small letters, digits, _ . and -, beginning with a letter or digit"
        )
    with _names() as base:
        folder = _claim(base / (name or _free_name(model)))
        job = Job.start(
            folder,
            [
                *(sys.executable, "-m", "kitae", "serve", *words),
                *("--api_key_file", str(folder / "token"), "--ready_file", str(folder / "ready.json")),
            ],
            grace_s=grace_s + MORE_S,
            facts={"model": model},
        )
    return Endpoint(job)


def wait(endpoint: Endpoint, *, timeout_s: float | None = None, tick: Any = None) -> str:
    """Wait until it runs or has ended, and return its state; `tick()` is called meanwhile."""
    begun = time.monotonic()
    while (state := endpoint.state()) in ("creating", "loading"):
        if timeout_s is not None and time.monotonic() - begun > timeout_s:
            break
        if tick:
            tick()
        time.sleep(0.1)
    return state


def remove(endpoint: Endpoint) -> None:
    """Delete the folder of an endpoint that has ended, with its token and log."""
    with _names():
        _remove(endpoint)


def _remove(endpoint: Endpoint) -> None:
    if endpoint.state() not in ENDED:
        raise LockedError(
            f"endpoint {endpoint.name} is {endpoint.state()}; stop it first: kitae endpoints stop {endpoint.name}"
        )
    shutil.rmtree(endpoint.job.folder)


@contextmanager
def _names() -> Iterator[Path]:
    """Inside it nobody else takes a name or gives one back; where endpoints lie."""
    base = home() / "endpoints"
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (base / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield base


def _claim(folder: Path) -> Path:
    """A new folder with a new token; what an endpoint of this name that has ended left is removed."""
    if (folder / "job.json").exists():
        _remove(Endpoint(Job(folder)))
    elif folder.is_dir() and {path.name for path in folder.iterdir()} <= BEFORE_A_JOB:
        shutil.rmtree(folder)  # of a kitae deploy that was killed
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError as error:
        raise LockedError(
            f"{folder} is there and is not an endpoint's; choose another --name, or remove it"
        ) from error
    descriptor = os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return folder


def _free_name(model: str) -> str:
    """A name made from the model's, with a number where an endpoint that is alive has it."""
    plain = re.sub(r"[^a-z0-9_.-]+", "-", Path(model.rstrip("/")).name.lower()).strip("-_.") or "model"
    taken = {endpoint.name for endpoint in everything() if endpoint.state() not in ENDED}
    numbered = (f"{plain[:70]}-{number}" for number in range(2, 10_000))
    return plain[:70] if plain[:70] not in taken else next(name for name in numbered if name not in taken)
