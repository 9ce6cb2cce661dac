"""What a client may ask: the fields of OpenAI's API with their ranges, and the sampling fields that vLLM added.

A field that this server cannot honour is refused by name, never passed over, unless its value asks for nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kitae.plugins import did_you_mean
from kitae.serve.refusals import Refusal

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_N, MAX_TOP_LOGPROBS = 16, 256, 8, 20
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (None,), "best_of": (None, 1), "frequency_penalty": (None, 0), "function_call": (None, "none", "auto"),
    "functions": (None, []), "logit_bias": (None, {}), "modalities": (None, ["text"]), "prediction": (None,),
    "presence_penalty": (None, 0), "store": (None, False), "suffix": (None,),
    "tool_choice": (None, "none", "auto"), "tools": (None, []), "web_search_options": (None,),
}  # fmt: skip
"""Fields this server does not offer, with the values that change nothing."""
INSTEAD = {
    "frequency_penalty": "use repetition_penalty",
    "presence_penalty": "use repetition_penalty",
    "best_of": "ask for n and choose",
}
IRRELEVANT = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "user",
)  # fmt: skip
"""Fields that say nothing about the answer."""
ABSENT_IN_TURNS = ("annotations", "audio", "function_call", "refusal", "tool_calls")
"""Fields of an answer that a client sends back in its history; this server's answers have none of them."""
T = TypeVar("T", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(_Body):
    """A JSON schema as OpenAI wraps it. It is always followed, strict or not."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def wanted_schema(self) -> dict[str, Any] | None:
        """The JSON schema to be followed, if any."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Refusal(
                "json_schema belongs to the type json_schema, which needs it", param="response_format"
            )
        if self.json_schema is not None:
            return self.json_schema.content
        return {"type": "object"} if self.type == "json_object" else None


class Asked(_Body):
    """What chat and plain completions have in common; None is the server's default."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=1024)
    n: int | None = Field(None, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """The stop strings."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        for text in found:
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise Refusal(
                    f"a stop string has {len(text)} characters; 1 to {MAX_STOP_CHARACTERS} are allowed",
                    param="stop",
                )
        return found

    @property
    def wanted_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to follow, if any."""
        return None if self.response_format is None else self.response_format.wanted_schema()

    def sampling(self) -> dict[str, Any]:
        """What the request says of SamplingSettings."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size")
        said = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "top_k" in said:
            said["top_k"] = max(said["top_k"], 0)  # -1 keeps all tokens elsewhere
        return said if self.stop is None else said | {"stop": self.stops()}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(_Body):
    """A piece of a turn's text."""

    type: Literal["text"]
    text: str


class Turn(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def message(self) -> dict[str, str]:
        """As templates read it. Earlier thinking that came apart from the content is not shown to the model again."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TemplateKwargs(_Body):
    """The switches of a chat template that a client may turn: whether the model thinks, under either name."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_format: Literal["inline", "split"] | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Alternatives per token; None without log-probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise Refusal("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def thinks(self) -> bool | None:
        """Whether the model is to think; None as the template has it."""
        switches = self.chat_template_kwargs or TemplateKwargs()
        said = {switches.thinking, switches.enable_thinking} - {None}
        if len(said) > 1:
            raise Refusal("thinking and enable_thinking contradict each other", param="chat_template_kwargs")
        return said.pop() if said else None


class CompletionAsked(Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


def parse(kind: type[T], body: bytes) -> T:
    """A request's body as `kind`, or a Refusal that names the field."""
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        if b"\\ud" in body.lower():  # half a surrogate pair is legal JSON and no text
            json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refusal(
            f"the body holds half a surrogate pair, which is no Unicode text: {error.object[error.start]!r}"
        ) from error
    except UnicodeDecodeError as error:
        raise Refusal(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise Refusal("the body has to be a JSON object")
    _drop_what_asks_nothing(given)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _named(error, kind) from error


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _drop_what_asks_nothing(given: dict[str, Any]) -> None:
    for name in IRRELEVANT:
        given.pop(name, None)
    for name in ASKS_NOTHING.keys() & given.keys():
        value = given.pop(name)
        if isinstance(value, bool) and name != "store":
            raise Refusal(f"{name} cannot be {value}", param=name)
        if value not in ASKS_NOTHING[name]:
            raise Refusal(
                f"{name} is not offered by this server; {INSTEAD.get(name, 'leave it out')}", param=name
            )
    turns = given.get("messages")
    for turn in turns if isinstance(turns, list) else []:
        for name in ABSENT_IN_TURNS:
            if isinstance(turn, dict) and turn.get(name, 0) in (None, []):
                del turn[name]


def _named(error: ValidationError, kind: type[BaseModel]) -> Refusal:
    """The complaint that goes deepest, with the field as a client would write it."""
    first = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    names = [part for part in first["loc"] if isinstance(part, int) or "[" not in part]
    names = [part for part in names if part not in ("str", "Part")]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = [*kind.model_fields, *ASKS_NOTHING] if len(names) == 1 else []
        hint = f"; {did_you_mean(str(names[-1]), known)}" if known else ""
        return Refusal(f"unknown field {where}{hint}", param=where)
    return Refusal(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}", param=where)
