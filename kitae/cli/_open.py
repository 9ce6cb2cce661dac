"""A model opened for use: what generate, chat and evaluate share, from settings to the sampling engine."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kitae.config import DataSettings, ModelSettings, SamplingSettings, require
from kitae.errors import DataError

if TYPE_CHECKING:
    from kitae.data.chat import Template
    from kitae.models.policy import Policy
    from kitae.rollout.choose import LocalEngine
    from kitae.types import Problem

log = logging.getLogger(__name__)


class UseSettings(SamplingSettings):
    """Which model, how it is asked, and how it samples."""

    model: str
    """A Hugging Face model folder, a hub id, a kitae run directory, or an adapter folder."""
    temperature: float = Field(0.6, ge=0, le=10)
    """Logits are divided by it; 0 is greedy."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Keep the smallest set of tokens whose probability reaches this."""
    seed: int = 0
    """The same seed gives the same completions."""
    system_prompt: str | None = None
    """System turn put before every conversation without one; default: the one the model was trained with."""
    template: str | None = None
    """Chat template: a .jinja file, a Colossal-AI conversation template .json, or alpaca; default: the model's own."""
    raw: bool = False
    """Give the model the prompt as it stands, without a chat template."""
    batch_size: int = Field(64, ge=1)
    """Completions sampled at the same time; memory grows with it, the result does not depend on it."""
    engine: Literal["auto", "generic", "native", "paged"] = "auto"
    """What samples: native is kitae's own C++ for Qwen, Llama and DeepSeek models on a CPU, compiled on first use; paged
    runs any model through transformers on one GPU, keys and values in pages, steps recorded as CUDA graphs; generic runs
    any model anywhere; auto takes paged on such a device, and native where it can run and the model is large enough for the
    compiling to pay."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute precision; auto takes bfloat16 where the device is fast in it, else float16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, or a device of an available backend, such as cuda or npu."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """nf4 stores the linear weights in 4 bits. int8 samples with them and their inputs rounded to 8 bits, by the native
    engine on a CPU: faster, and the answers are those of a slightly other model."""
    kv_cache_tokens: int | None = Field(None, ge=16)
    """Tokens whose keys and values the native or paged engine keeps at a time, of all completions under way. More of them
    need more memory and let more completions run side by side; the others wait, and the result does not depend on it.
    Default: what half of the memory that is free when sampling begins can hold."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for folders whose code you have read."""

    def sampling(self, *, max_new_tokens: int | None = None) -> SamplingSettings:
        """The part that says how to sample."""
        fields = {name: getattr(self, name) for name in SamplingSettings.model_fields}
        return SamplingSettings(**fields | {"max_new_tokens": max_new_tokens or self.max_new_tokens})

    def model_settings(self, *, name: str | None = None) -> ModelSettings:
        """The part that says what to load; `name` takes another model with the same choices."""
        own = ("revision", "tokenizer", "dtype", "device", "trust_remote_code")
        stored = "nf4" if self.quantization == "nf4" else "none"
        return ModelSettings(
            name_or_path=name or self.model, quantization=stored, **{key: getattr(self, key) for key in own}
        )


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model with its template and an engine that samples from it."""

    policy: Policy
    template: Template
    engine: LocalEngine

    @property
    def context(self) -> int | None:
        """The most tokens the model can look at, where it says so."""
        config: Any = self.policy.causal_lm.config  # transformers' own class, one for each architecture
        found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        return found

    def ask(self, messages: list[dict[str, str]], *, index: int = 0, thinks: bool = True) -> Problem:
        """A conversation, rendered up to where the assistant speaks; a template may have a switch for thinking."""
        from kitae.data.chat import THINKING_ON
        from kitae.types import Problem

        switches = {} if thinks else dict.fromkeys(THINKING_ON, False)
        ids, prefill = self.template.prompt(messages, **switches)
        return Problem(prompt=messages[-1]["content"], token_ids=ids, prefill=prefill, index=index)

    def ask_raw(self, text: str, *, index: int = 0) -> Problem:
        """A prompt as it stands; control tokens in it are control tokens."""
        from kitae.types import Problem

        for written, token in lookalikes(text, list(self.template.tokenizer.get_added_vocab())):
            log.warning("%s is ordinary text to this tokenizer; its token is %s", written, token)
        return Problem(prompt=text, token_ids=self.template.tokenizer.encode(text), index=index)


def open_model(
    use: UseSettings,
    *,
    name: str | None = None,
    default_system_prompt: str | None = None,
    must_chat: bool = True,
) -> Opened:
    """Load model, template and engine; `name` takes another model with the same choices.

    `default_system_prompt` is for a model that was not trained with kitae, where use.system_prompt says nothing. A model
    without chat template is refused, unless prompts are given to it as they stand (use.raw) or it need not chat.
    """
    from kitae.data.chat import Template
    from kitae.data.templates import saved_template
    from kitae.models.load import load_policy, load_tokenizer
    from kitae.rollout.choose import open_engine

    model = use.model_settings(name=name)
    data = DataSettings(system_prompt=use.system_prompt, template=use.template)
    is_here = Path(model.name_or_path).is_dir()
    if is_here and saved_template(model.name_or_path) is not None:
        default_system_prompt = None  # it was trained with a system prompt, or without one
    template = Template.load(
        load_tokenizer(model),
        data=data,
        default_system_prompt=default_system_prompt,
        must_chat=must_chat and not use.raw,
    )
    require(
        template.can_chat or not use.system_prompt,
        f"system_prompt has no effect: {model.name_or_path} has no chat template; leave it out, or set template",
    )
    if is_here:
        for difference in template.differences(model.name_or_path):
            log.warning("%s was trained with another template: %s", model.name_or_path, difference)
    policy = load_policy(model, trainable=False, may_spread=True)
    engine, _ = open_engine(
        policy,
        wanted=use.engine,
        setting="engine",
        expected_tokens=use.batch_size * use.max_new_tokens,
        stop_ids=template.stop_ids,
        decode=template.decode,
        max_rows=use.batch_size,
        quantization="int8" if use.quantization == "int8" else "none",
        kv_cache_tokens=use.kv_cache_tokens,
    )
    return Opened(policy=policy, template=template, engine=engine)


def lookalikes(text: str, tokens: list[str]) -> list[tuple[str, str]]:
    """(what is written, the token it resembles) for ASCII spellings of tokens with full-width bars.

    Example: `<|User|>` where the tokenizer has a token of the same letters between U+FF5C bars.
    """
    found = []
    for token in tokens:
        ascii_form = token.replace("\uff5c", "|").replace("\u2581", "_")
        spaced = ascii_form.replace("_", " ")
        for written in dict.fromkeys((ascii_form, spaced)):
            if written != token and written not in tokens and written in text:
                found.append((written, token))
    return found


def read_prompts(path: str) -> list[str]:
    """One prompt a line; `-` is standard input."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts from {path}: {error}") from error
    require_unicode(text, what=f"what {path} holds")
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DataError(f"{path} has no prompts")
    return prompts


def require_unicode(text: str, *, what: str) -> None:
    """Refuse text with bytes that are no UTF-8; from a terminal or a command line they come as half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not UTF-8 at character {error.start + 1}: {text[error.start : error.start + 1]!r}; save or type it "
            "in UTF-8"
        ) from error


def warn_on_stderr(warnings: list[str]) -> None:
    """Let kitae's log warnings reach the terminal, and other libraries' errors, and say those of the settings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: record.name.startswith("kitae") or record.levelno >= logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="kitae: %(message)s", handlers=[handler])
    for warning in warnings:
        log.warning("%s", warning)
