"""The routes of the server: /v1/models, /v1/chat/completions, /v1/completions, /health and /metrics.

    request --token--> body within its limits --schemas--> prompt ids --context, queue--> ticket --> answer

Everything but /health needs the token. A request that cannot be served is a Refusal, and only its own.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from kitae.config import SamplingSettings
from kitae.data.chat import THINKING_ON
from kitae.data.formats import RowError
from kitae.serve.access import Gate
from kitae.serve.answering import Answering, EventStream, Scores
from kitae.serve.answers import Frame
from kitae.serve.choices import ChatChoice, TextChoice
from kitae.serve.engine import EngineThread, Job, Ticket
from kitae.serve.forms import Forms, Thinking, asks_to_think
from kitae.serve.guard import Guard, as_json, failed, handled, http_error
from kitae.serve.metrics import Metrics
from kitae.serve.refusals import Refusal
from kitae.serve.schemas import Asked, ChatAsked, CompletionAsked, parse
from kitae.serve.tokens import TokenTexts
from kitae.types import Problem

if TYPE_CHECKING:
    from kitae.data.chat import Template
    from kitae.rollout.constraint import Constraint

CHARACTERS_PER_TOKEN = 8
"""A text of more characters than this times the context is refused before it is tokenised, which would take long."""
INLINE_CHARACTERS = 20_000
"""Longer texts are tokenised beside the event loop."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may ask of the server."""

    context: int
    """Most tokens of prompt and completion together."""
    vocabulary: int
    """Token ids of prompts are below this."""
    max_new_tokens: int
    """Most tokens of a completion, and what a chat gets that does not say."""
    max_rows: int
    """Completions that run at a time."""
    max_queue: int
    """Completions that may wait beyond those."""
    max_request_bytes: int
    body_timeout_s: float = 30.0


class Service:
    """Everything the routes need."""

    def __init__(
        self,
        engine: EngineThread,
        *,
        template: Template,
        defaults: SamplingSettings,
        limits: Limits,
        reasoning_format: Literal["inline", "split"],
        aliases: Sequence[str] = (),
    ) -> None:
        """`aliases`: further names of the first lane's model."""
        self.engine, self.template, self.limits = engine, template, limits
        self.metrics = Metrics(engine)
        self.is_draining = False
        self._defaults, self._reasoning_format = defaults, reasoning_format
        self._texts = TokenTexts(template.tokenizer)
        self._stop_ids = frozenset(template.stop_ids)
        self._forms = Forms(self._texts, stop_ids=self._stop_ids)
        self._created = int(time.time())
        first = next(iter(engine.lanes))
        self._lane_of = dict.fromkeys(aliases, first) | {name: name for name in engine.lanes}
        question = [{"role": "user", "content": "Hi"}]
        self._has_switch = template.can_chat and (
            template.prompt(question) != template.prompt(question, **_switches(False))
        )

    def drain(self) -> None:
        """Take no more requests."""
        self.is_draining = True

    # routes ----------------------------------------------------------------------------------------------------

    async def health(self, _request: Request) -> Response:
        """Whether it works."""
        if self.is_draining or not self.engine.is_alive:
            return as_json({"status": "ending" if self.is_draining else "the engine has died"}, status=503)
        return as_json({"status": "ok"})

    async def metrics_text(self, _request: Request) -> Response:
        """Prometheus' numbers."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request) -> Response:
        """All models."""
        return as_json({"object": "list", "data": [self._model(name) for name in self.engine.lanes]})

    async def model(self, request: Request) -> Response:
        """One model."""
        return as_json(self._model(self._find(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        """A chat completion."""
        begun = time.monotonic()
        asked = parse(ChatAsked, await self._body(request))
        lane = self._find(asked.model)
        token_ids, prefill = await self._render(asked)
        room = min(self._room(len(token_ids)), self.limits.max_new_tokens)
        limit = self._checked_limit(asked.limit or room, len(token_ids))
        thinking = asks_to_think(prefill, thinks=asked.thinks, texts=self._texts)
        form = await self._form(asked, thinking=thinking)
        job = self._job(asked, token_ids, limit=limit, prefill=prefill, form=form)
        # Content that has to parse has no thinking before it, unless the request itself wants it there.
        default = self._reasoning_format if form is None else "split"
        splits = (asked.reasoning_format or default) == "split"
        wants_logprobs = asked.num_top_logprobs is not None

        def choices(_scores: Scores) -> list[ChatChoice]:
            how: dict[str, Any] = {"texts": self._texts, "stop_ids": self._stop_ids, "splits": splits}
            return [
                ChatChoice(i, prefill=prefill, wants_logprobs=wants_logprobs, **how)
                for i in range(len(job.limits))
            ]

        frame = Frame(model=lane, kind="chat.completion")
        return await self._answer(request, asked, frame, [job], choices, begun)

    async def complete(self, request: Request) -> Response:
        """A text completion."""
        begun = time.monotonic()
        asked = parse(CompletionAsked, await self._body(request))
        lane = self._find(asked.model)
        given = asked.prompts()
        if not given:
            raise Refusal("prompt is empty", param="prompt")
        self._require_place(len(given) * (asked.n or 1))  # before the work of encoding them
        prompts = await self._encode(given)
        limit = 16 if asked.max_tokens is None else asked.max_tokens  # OpenAI's default
        if limit == 0 and not asked.echo:
            raise Refusal("max_tokens can be 0 only with echo", param="max_tokens")
        for ids in prompts:
            self._checked_limit(limit, len(ids))
        form = await self._form(asked, thinking="none")
        jobs = [self._job(asked, ids, limit=limit, index=i, form=form) for i, ids in enumerate(prompts)]
        each = max(len(jobs[0].limits), 1)

        def choices(scores: Scores) -> list[TextChoice]:
            how: dict[str, Any] = {"texts": self._texts, "stop_ids": self._stop_ids}
            return [
                TextChoice(
                    place * each + number,
                    echo=ids if asked.echo else None,
                    scores=scores[place] if scores else None,
                    wants_logprobs=asked.logprobs is not None,
                    **how,
                )
                for place, ids in enumerate(prompts)
                for number in range(each)
            ]

        return await self._answer(
            request, asked, Frame(model=lane, kind="text_completion"), jobs, choices, begun
        )

    # how it is done ----------------------------------------------------------------------------------------------

    async def _body(self, request: Request) -> bytes:
        most = self.limits.max_request_bytes
        too_large = Refusal(f"the request is larger than {most:,} bytes", status=413)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal("send the body without Content-Encoding", status=415)
        if (
            not request.headers.get("content-length", "0").isdigit()
            or int(request.headers.get("content-length", 0)) > most
        ):
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError as error:
            raise Refusal(
                f"the body did not come within {self.limits.body_timeout_s:g} s", status=408
            ) from error
        return b"".join(parts)

    def _find(self, name: str | None) -> str:
        if name is None:
            return next(iter(self.engine.lanes))
        if name not in self._lane_of:
            known = ", ".join(self.engine.lanes)
            raise Refusal(
                f"there is no model {name!r}; there are: {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self._lane_of[name]

    def _model(self, name: str) -> dict[str, Any]:
        parent = self.engine.lanes[name].parent
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "kitae",
            "parent": parent,
            "max_model_len": self.limits.context,
        }

    async def _render(self, asked: ChatAsked) -> tuple[list[int], str]:
        messages = [turn.message() for turn in asked.messages]
        if not self.template.can_chat:
            raise Refusal(
                "this model has no chat template: ask /v1/completions, or start the server with --template FILE (.jinja, a "
                "Colossal-AI conversation template, or alpaca)",
                param="messages",
            )
        if asked.thinks is not None and not self._has_switch:
            raise Refusal(
                "this model's chat template has no switch for thinking; leave chat_template_kwargs out",
                param="chat_template_kwargs",
            )
        switches = {} if asked.thinks is None else _switches(asked.thinks)
        size = sum(len(message["content"]) for message in messages)
        self._check_characters(size, param="messages")
        try:
            if size < INLINE_CHARACTERS:
                return self.template.prompt(messages, **switches)
            return await asyncio.to_thread(self.template.prompt, messages, **switches)
        except RowError as error:
            raise Refusal(str(error), param="messages") from error

    async def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Prompts as they stand: control tokens in them are control tokens."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        for text in texts:
            self._check_characters(len(text), param="prompt")
        if sum(map(len, texts)) < INLINE_CHARACTERS:
            found = self._ids_of(prompts)
        else:
            found = await asyncio.to_thread(self._ids_of, prompts)
        for ids in found:
            if not ids:
                raise Refusal("a prompt has no tokens to continue from", param="prompt")
            wrong = next((i for i in ids if not 0 <= i < self.limits.vocabulary), None)
            if wrong is not None:
                raise Refusal(f"token id {wrong} is not below {self.limits.vocabulary}", param="prompt")
        return found

    def _ids_of(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        encode = self.template.tokenizer.encode
        return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _check_characters(self, size: int, *, param: str) -> None:
        if size > CHARACTERS_PER_TOKEN * self.limits.context:
            raise Refusal(
                f"{param} has {size:,} characters, far beyond the model's context of {self.limits.context:,} tokens",
                param=param,
                code="context_length_exceeded",
            )

    def _room(self, prompt_tokens: int) -> int:
        room = self.limits.context - prompt_tokens
        if room < 1:
            raise Refusal(
                f"the prompt has {prompt_tokens:,} tokens, which fills the model's context of {self.limits.context:,}",
                param="messages",
                code="context_length_exceeded",
            )
        return room

    def _checked_limit(self, limit: int, prompt_tokens: int) -> int:
        if limit > self.limits.max_new_tokens:
            raise Refusal(
                f"max_tokens is {limit:,}; this server allows {self.limits.max_new_tokens:,}",
                param="max_tokens",
            )
        if prompt_tokens + limit > self.limits.context:
            raise Refusal(
                f"the prompt has {prompt_tokens:,} tokens and max_tokens is {limit:,}: together more than the model's "
                f"context of {self.limits.context:,}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return limit

    async def _form(self, asked: Asked, *, thinking: Thinking) -> Callable[[], Constraint] | None:
        if (schema := asked.wanted_schema) is None:
            return None
        self._require_place(asked.n or 1)  # before the work of compiling it
        return await self._forms.compile(schema, thinking=thinking)

    def _job(
        self,
        asked: Asked,
        token_ids: list[int],
        *,
        limit: int,
        form: Callable[[], Constraint] | None,
        prefill: str = "",
        index: int = 0,
    ) -> Job:
        num_top = asked.num_top_logprobs if isinstance(asked, ChatAsked) else getattr(asked, "logprobs", None)
        scores = isinstance(asked, CompletionAsked) and bool(asked.echo) and asked.logprobs is not None
        sampling = self._defaults.model_copy(update=asked.sampling() | {"max_new_tokens": max(limit, 1)})
        if form is not None and sampling.no_repeat_ngram_size:
            raise Refusal(
                "no_repeat_ngram_size would forbid what JSON repeats; send 0 with response_format",
                param="no_repeat_ngram_size",
            )
        return Job(
            problem=Problem(prompt="", token_ids=token_ids, prefill=prefill, index=index),
            limits=[limit] * (asked.n or 1) if limit else [],
            sampling=sampling,
            seed=secrets.randbits(62) if asked.seed is None else asked.seed,
            num_top_logprobs=num_top or 0,
            scores_prompt=scores,
            new_constraint=form,
        )

    async def _answer(
        self, request: Request, asked: Asked, frame: Frame, jobs: list[Job], choices_of: Any, begun: float
    ) -> Response:
        ticket = Ticket(lane=frame.model, jobs=jobs, loop=asyncio.get_running_loop())
        self._require_place(ticket.num_places)
        self.engine.submit(ticket)
        answering = Answering(
            engine=self.engine,
            metrics=self.metrics,
            ticket=ticket,
            frame=frame,
            prompt_tokens=sum(len(job.problem.token_ids) for job in jobs),
            choices_of=choices_of,
            is_stream=bool(asked.stream),
            wants_usage=asked.wants_usage,
            begun=begun,
        )
        return EventStream(answering) if asked.stream else await answering.whole(request.receive)

    def _require_place(self, count: int) -> None:
        most = self.limits.max_rows + self.limits.max_queue
        if self.is_draining:
            raise Refusal("the server is ending", status=503)
        if count > most:
            raise Refusal(
                f"the request asks for {count} completions at once; this server holds {most}", param="n"
            )
        if self.engine.num_open + count > most:
            raise Refusal(
                f"{self.engine.num_open} completions are under way or waiting; try again",
                status=429,
                retry_after_s=1,
            )


def make_app(service: Service, *, gate: Gate) -> ASGIApp:
    """The whole application."""
    routes = [
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.metrics_text),
    ]
    app = Starlette(
        routes=routes, exception_handlers={HTTPException: http_error, Refusal: handled, Exception: failed}
    )
    app.router.redirect_slashes = False
    return Guard(app, gate=gate, metrics=service.metrics)


def _switches(value: bool) -> dict[str, bool]:
    return dict.fromkeys(THINKING_ON, value)
