"""Sampling from an OpenAI-compatible endpoint: POST <base_url>/chat/completions, several requests at a time.

    problems --messages--> requests --threads, retries--> replies --as_text--> rollouts without tokens

Such rollouts have text and a reported number of tokens, but no token ids and no log-probabilities: they can be judged
and taught, not reinforced. What may pass by itself (busy, broken off, too slow, garbage) is tried again; what will not
(a wrong key, an unknown model, a request that is refused) is an error at once.
"""

from __future__ import annotations

import http.client
import json
import logging
import queue
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from kitae.config import SamplingSettings
from kitae.errors import ConfigError, EndpointError
from kitae.rollout.base import OnRollout, OnTokens, request_seed
from kitae.rollout.endpoint import Endpoint, chat_url, is_loopback, usable_key
from kitae.rollout.reply import Passing, Reply, message_of, parse, read_body, retry_after
from kitae.types import Problem, Rollout

log = logging.getLogger(__name__)

T = TypeVar("T")
Messages = list[dict[str, str]]

ABOUT_THE_REQUEST = (400, 413, 422)
NOT_RETRIED = (501, 505)
"""Server errors that will be the same next time; the others, 408 and 429 may pass."""
LONGEST_BACKOFF_S = 60.0
SECONDS_BETWEEN_WARNINGS = 30.0
SHOWN = 300
"""Characters of a server's own message that are shown."""
NOT_PLAIN = ("top_k", "min_p", "repetition_penalty")
"""Sampling settings that OpenAI's own service does not know; sent only where they differ from their defaults."""


class RequestRefused(EndpointError):
    """A request the server does not take, such as one that is too long for its model; others may fare better."""


class _GivenUp(Exception):
    """The request was left because another one had failed for good."""


class _Here(threading.local):
    """What ends the waiting of this thread."""

    def __init__(self) -> None:
        self.stop = threading.Event()


class HttpEngine:
    """A RolloutEngine over HTTP. A completion depends on the server; seed, problem and number are sent along."""

    def __init__(
        self, endpoint: Endpoint, *, messages_of: Callable[[Problem], Messages], concurrency: int = 16
    ) -> None:
        """`messages_of` gives the conversation that is sent for a problem; at most `concurrency` are under way."""
        self.endpoint = endpoint
        self.url = chat_url(endpoint.base_url)
        self._messages_of, self._concurrency = messages_of, concurrency
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if is_loopback(self.url):  # a proxy for the outside world does not know this machine's own servers
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "kitae",
        }
        if endpoint.api_key is not None:
            self._headers["Authorization"] = f"Bearer {usable_key(endpoint.api_key)}"
        self._jitter = random.Random()
        self._here = _Here()
        self._silent_until = 0.0
        self._not_before = 0.0
        """No request starts before this monotonic time: a server that asks one of us to wait means all."""

    def sync(self) -> None:
        """Nothing to do: the weights are the server's."""

    def generate(
        self,
        problems: Sequence[Problem],
        *,
        n: int,
        sampling: SamplingSettings,
        seed: int,
        on_tokens: OnTokens | None = None,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        """See RolloutEngine; on_tokens is never called, since no tokens are sent, and on_rollout from several threads."""
        groups: list[list[Rollout | None]] = [[None] * n for _ in problems]
        wanted = [(place, sample) for place in range(len(problems)) for sample in range(n)]

        def ask(item: tuple[int, int]) -> None:
            place, sample = item
            groups[place][sample] = rollout = self.ask(problems[place], sample, sampling=sampling, seed=seed)
            if on_rollout is not None:
                on_rollout(place, sample, rollout)

        for _ in self.each(wanted, ask):
            pass
        return [[rollout for rollout in group if rollout is not None] for group in groups]

    def each(self, items: Iterable[T], do: Callable[[T], Any]) -> Iterator[Any]:
        """`do(item)` in threads, its results (Any: whatever it returns) as they come, in no order.

        After a failure no further item is begun; what is under way is still waited for and given, then the error is
        raised. Closing the iterator waits for nothing.
        """
        source, lock = iter(items), threading.Lock()
        results: queue.Queue[tuple[str, Any]] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            self._here.stop = stop
            try:
                while not stop.is_set():
                    with lock:
                        item = next(source)
                    results.put(("result", do(item)))
            except (StopIteration, _GivenUp):
                pass
            except BaseException as error:
                stop.set()
                results.put(("error", error))
            finally:
                results.put(("end", None))

        for _ in range(self._concurrency):
            threading.Thread(target=work, name="kitae-endpoint", daemon=True).start()
        working, failure = self._concurrency, None
        try:
            while working:
                kind, value = results.get()
                if kind == "result":
                    yield value
                elif kind == "end":
                    working -= 1
                elif failure is None:
                    failure = value
                    if working > 1:
                        log.warning(
                            "stopping; answers that are under way are waited for (Ctrl-C leaves at once)"
                        )
        finally:
            stop.set()
        if failure is not None:
            raise failure

    def ask(self, problem: Problem, sample: int, *, sampling: SamplingSettings, seed: int) -> Rollout:
        """One completion of one problem."""
        body = self.body(problem, sample, sampling=sampling, seed=seed)
        reply = self._patiently(json.dumps(body).encode(), which=f"problem {problem.index}, answer {sample}")
        return Rollout(
            problem=problem,
            text=reply.text,
            token_ids=[],
            logprobs=[],
            finish_reason=reply.finish_reason,
            reported_tokens=reply.num_tokens,
        )

    def body(self, problem: Problem, sample: int, *, sampling: SamplingSettings, seed: int) -> dict[str, Any]:
        """The JSON object that is sent (Any: JSON values)."""
        if sampling.no_repeat_ngram_size:
            raise ConfigError(
                f"no_repeat_ngram_size is {sampling.no_repeat_ngram_size}, which no endpoint knows; leave it out"
            )
        fields: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": self._messages_of(problem),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request_seed(seed, problem.index, sample) % 2**31,
        }
        default = SamplingSettings()
        for name in ("stop", *NOT_PLAIN):
            if getattr(sampling, name) != getattr(default, name):
                fields[name] = getattr(sampling, name)
        fields |= self.endpoint.extra_body or {}
        return {name: value for name, value in fields.items() if value is not None}

    def _patiently(self, body: bytes, *, which: str) -> Reply:
        """Ask until there is an answer, an error that stays, or no attempt left."""
        attempts = self.endpoint.max_attempts
        for attempt in range(1, attempts + 1):
            self._sleep_until(self._not_before)
            try:
                return self._once(body, which=which)
            except Passing as failure:
                reason, asked_s = self._clean(str(failure)), failure.wait_s
            if asked_s is not None and asked_s > self.endpoint.longest_wait_s:
                raise EndpointError(f"{self.url} asks to be left alone for {asked_s:.0f} s ({reason})")
            backoff_s = min(self.endpoint.retry_wait_s * 2 ** (attempt - 1), LONGEST_BACKOFF_S)
            wait_s = max(backoff_s * self._jitter.uniform(0.5, 1.5), asked_s or 0.0)
            following = f", the next in {wait_s:.1f} s" if attempt < attempts else ""
            self._tell(f"{which}: {reason}; attempt {attempt} of {attempts}{following}")
            if asked_s is not None:
                self._not_before = max(self._not_before, time.monotonic() + asked_s)
            if attempt < attempts:
                self._sleep_until(time.monotonic() + wait_s)
        raise EndpointError(f"{self.url} failed {attempts} times for {which}: {reason}")

    def _tell(self, trouble: str) -> None:
        """Warn now and then: many requests meet the same trouble."""
        now = time.monotonic()
        is_due = now >= self._silent_until
        if is_due:
            self._silent_until = now + SECONDS_BETWEEN_WARNINGS
        log.log(logging.WARNING if is_due else logging.DEBUG, "%s", trouble)

    def _sleep_until(self, when: float) -> None:
        if self._here.stop.wait(max(when - time.monotonic(), 0.0)):
            raise _GivenUp

    def _once(self, body: bytes, *, which: str) -> Reply:
        request = urllib.request.Request(self.url, data=body, headers=self._headers, method="POST")
        deadline = time.monotonic() + self.endpoint.timeout_s
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout_s) as response:
                return parse(read_body(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, which=which) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise EndpointError(f"{self.url}: {self._clean(str(error.reason))}") from None
            raise Passing(f"cannot be reached: {error.reason}") from None
        except TimeoutError:
            raise Passing(f"no whole answer within timeout_s = {self.endpoint.timeout_s:g}") from None
        except (http.client.HTTPException, OSError) as error:
            raise Passing(f"the connection broke: {type(error).__name__} {error}") from None

    def _refused(self, error: urllib.error.HTTPError, *, which: str) -> Exception:
        """The error an HTTP status stands for."""
        try:
            said = message_of(error.read(65536))
        except (http.client.HTTPException, OSError):
            said = ""
        reason = f"HTTP {error.code} {error.reason}" + (f": {said}" if said else "")
        if error.code in (408, 429) or (error.code >= 500 and error.code not in NOT_RETRIED):
            return Passing(reason, wait_s=retry_after(error.headers.get("Retry-After")))
        remedy = {
            401: "check the key (api_key_env)",
            403: "check the key (api_key_env) and what it may use",
            404: "check base_url, which often ends in /v1, and the model's name",
        }.get(error.code, "change the request (extra_body, sampling) or the problem")
        if 300 <= error.code < 400:
            remedy = "it leads elsewhere; give that address as base_url"
        kind = RequestRefused if error.code in ABOUT_THE_REQUEST else EndpointError
        return kind(f"{self.url} refused {which}: {self._clean(reason)}; {remedy}")

    def _clean(self, text: str) -> str:
        """One short line for a person, without the key that some servers repeat."""
        if self.endpoint.api_key:
            text = text.replace(self.endpoint.api_key.strip(), "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the POST into a GET, and carry the key to another machine."""

    def redirect_request(self, *_: Any, **__: Any) -> None:  # urllib's signature, whatever it hands over
        return None
