"""Who answers the problems of kitae sample: a model that is loaded here, or one behind an address.

Both know what identifies them, ask what is missing, and hand the judged answers on as they come.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from kitae.cli._open import Opened, open_model
from kitae.cli._sample_view import View
from kitae.config import RewardSettings, require
from kitae.errors import ConfigError, StoppedError

if TYPE_CHECKING:
    from kitae.cli.sample import Settings
    from kitae.data.sources import Dataset
    from kitae.evaluate.answers import Asked
    from kitae.recipes._rewards import Rewards
    from kitae.rewards.pool import RewardPool
    from kitae.rollout.http import HttpEngine
    from kitae.types import Problem

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "kitae_template.json")
"""What decides, besides the weights, how a local teacher is asked."""
WAVES = 8
"""A local model gets so many times batch_size completions at once: few enough to keep in memory, and enough that the
last ones, which run alone, cost little."""


class Local:
    """A model that is loaded here. It answers whole groups; a problem that lacks an answer is sampled again, alike."""

    def __init__(self, use: Settings, dataset: Dataset) -> None:
        from kitae.models.files import find_model
        from kitae.models.fingerprint import model_fingerprint
        from kitae.train.files import content_hash

        self._use, self._dataset = use, dataset
        found = find_model(use.model, revision=use.revision, with_code=use.trust_remote_code)
        self.provenance = {"model": found.name if found.adapter is None else str(found.adapter.resolve())}
        self.provenance["fingerprint"] = model_fingerprint(found)
        own = ("system_prompt", "template", "raw", "engine", "tokenizer", "dtype", "quantization")
        self.identity = {"fingerprint": self.provenance["fingerprint"]} | {
            name: getattr(use, name) for name in own
        }
        folder = found.adapter or found.folder
        self.identity |= {n: content_hash(folder / n) for n in TEXT_FILES if (folder / n).is_file()}
        self.opened: dict[str, Any] = {}

    def ask(self, asked: Asked, *, on_open: Callable[[], None]) -> None:
        """Load the model, and ask what is not answered yet."""
        from kitae.data.problems import RenderedProblems
        from kitae.evaluate.sample import ask_engine

        use = self._use
        opened = open_model(use, default_system_prompt=_form_instruction(use, self._dataset))
        longest = (opened.context or sys.maxsize) - use.max_new_tokens
        require(
            longest > 0,
            f"max_new_tokens is {use.max_new_tokens}, but the model's context is {opened.context}; lower it",
        )
        problems = RenderedProblems(
            self._dataset,
            template=opened.template,
            max_prompt_length=longest,
            skip_bad=use.on_bad_row == "skip",
        )
        self.opened = {
            "system_prompt": None if use.raw else opened.template.system_prompt,
            "too_long": problems.num_dropped,
            "answers": len(problems) * use.n,
        }
        on_open()
        missing = [
            i
            for i, index in enumerate(problems.indices)
            if any((index, sample) not in asked.places for sample in range(use.n))
        ]
        view = View(total=len(problems) * use.n, done=len(problems) * use.n - len(missing) * use.n)
        with _pool(use) as pool, _stopping():
            ask_engine(
                opened.engine,
                _Chosen(problems, missing, opened if use.raw else None),
                n=use.n,
                sampling=use.sampling(),
                seed=use.seed,
                pool=pool,
                on_answers=lambda answers: view.update(asked.append(answers)),
                on_token=view.on_token,
                problems_at_once=max(1, WAVES * use.batch_size // use.n),
            )
        view.close()


class _Chosen(Sequence["Problem"]):
    """Some of the problems by their place, rendered when they are taken; raw ones without the chat template."""

    def __init__(self, problems: Sequence[Problem], places: Sequence[int], raw: Opened | None) -> None:
        self._problems, self._places, self._raw = problems, places, raw

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        from dataclasses import replace

        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        problem = self._problems[self._places[index]]
        if self._raw is None:
            return problem
        return replace(problem, token_ids=self._raw.ask_raw(problem.prompt).token_ids, prefill="")


class Remote:
    """A model behind an address. It answers one request at a time, and only what is missing is asked."""

    def __init__(self, use: Settings, dataset: Dataset) -> None:
        self._use, self._dataset = use, dataset
        asked_for = _form_instruction(use, dataset) if use.system_prompt is None else use.system_prompt
        self.system_prompt = asked_for or None
        self.opened: dict[str, Any] = {
            "system_prompt": self.system_prompt,
            "too_long": 0,
            "answers": len(dataset) * use.n,
        }
        self._engine = self._make_engine()
        self.provenance = {"model": use.model, "base_url": str(use.base_url)}
        self.identity = {**self.provenance, "system_prompt": self.system_prompt, "extra_body": use.extra_body}

    def _make_engine(self) -> HttpEngine:
        from kitae.rollout.endpoint import Endpoint, is_loopback
        from kitae.rollout.http import HttpEngine

        use = self._use
        endpoint = Endpoint(
            base_url=str(use.base_url),
            model=use.model,
            api_key=_key(use),
            timeout_s=use.timeout_s,
            max_attempts=use.max_attempts,
            retry_wait_s=use.retry_wait_s,
            longest_wait_s=use.longest_wait_s,
            extra_body=_extra(use.extra_body),
        )
        engine = HttpEngine(endpoint, messages_of=self._messages, concurrency=use.concurrency)
        if endpoint.api_key and engine.url.startswith("http://") and not is_loopback(engine.url):
            log.warning(
                "the key goes to %s unencrypted; use https:// where others share the network", use.base_url
            )
        return engine

    def _messages(self, problem: Problem) -> list[dict[str, str]]:
        turns = [{"role": t["role"], "content": t["content"]} for t in self._dataset[problem.index].question]
        if self.system_prompt and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return turns

    def ask(self, asked: Asked, *, on_open: Callable[[], None]) -> None:
        """Ask what is not answered yet."""
        from kitae.evaluate.sample import ask_endpoint

        use = self._use
        on_open()
        view = View(total=self.opened["answers"], done=len(asked.places))
        with _pool(use) as pool, _stopping():
            ask_endpoint(
                self._engine,
                self._missing(asked),
                sampling=use.sampling(),
                seed=use.seed,
                pool=pool,
                on_answers=lambda answers: view.update(asked.append(answers)),
                skips_refused=use.on_bad_row == "skip",
            )
        view.close()

    def _missing(self, asked: Asked) -> Iterator[tuple[Problem, int]]:
        from kitae.types import Problem

        answered = set(asked.places)  # those of earlier: asked.places grows while this is read
        for index in range(len(self._dataset)):
            samples = [s for s in range(self._use.n) if (index, s) not in answered]
            if samples:
                example = self._dataset[index]
                problem = Problem(
                    prompt=example.question[-1]["content"],
                    token_ids=[],
                    answer=example.answer,
                    columns=example.columns,
                    index=index,
                )
                yield from ((problem, s) for s in samples)


def _form_instruction(use: Settings, dataset: Dataset) -> str | None:
    """What a teacher is told so that its answers can have the form that is rewarded."""
    from kitae.data.instructions import form_instruction

    if use.reward != "reasoning":
        return None
    texts = (dataset[i].question[-1]["content"] for i in range(min(200, len(dataset))))
    return form_instruction(texts, form=use.form)


def _key(use: Settings) -> str | None:
    key = os.environ.get(use.api_key_env or KEY_VARIABLE)
    require(
        key is not None or use.api_key_env is None,
        f"api_key_env is {use.api_key_env}, but there is no such environment variable; set it to the key",
    )
    return key


def _extra(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"extra_body is {text!r}, which is no JSON: {error}") from error
    require(
        isinstance(value, dict), f"extra_body is {text!r}; it is a JSON object, such as '{{\"top_k\": 20}}'"
    )
    found: dict[str, Any] = value
    return found


def _pool(use: Settings) -> RewardPool | Rewards:
    from kitae.recipes._rewards import open_rewards

    return open_rewards(
        RewardSettings(
            function=use.reward,
            form=use.form,
            strict_form=use.strict_form,
            timeout_s=use.reward_timeout_s,
            on_error="mask",
        )
    )


@contextmanager
def _stopping() -> Iterator[None]:
    """Inside it, a signal that ends the process ends the asking first, so that it can say how to go on."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StoppedError(f"stopped by {signal.Signals(number).name}", signal_number=number)

    numbers = [
        n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN
    ]
    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # outside the main thread Python allows no handlers
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
