"""Where a chat template comes from: the tokenizer, a .jinja file, a Colossal-AI conversation template, or alpaca."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kitae.config import DataSettings
from kitae.data.sandbox import MAX_TEMPLATE_BYTES, why_unsafe
from kitae.data.tokens import TAGS
from kitae.errors import ConfigError, ModelError

log = logging.getLogger(__name__)

TEMPLATE_FILE = "kitae_template.json"
"""What a saved model knows beyond its tokenizer: system prompt, stop ids, fingerprint."""

ALPACA = (
    "{{ bos }}{% if messages[0]['role'] != 'system' %}"
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token + '\\n' }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\\n' }}"
    "{% else %}{{ '### Instruction:\\n' + m['content'] + '\\n### Response:\\n' }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSource:
    """A chat template and what came along with it."""

    text: str
    origin: str
    """What messages call it."""
    system_prompt: str | None = None
    stop_ids: tuple[int, ...] = ()


def find_template(tokenizer: Any, *, data: DataSettings, must_exist: bool = True) -> TemplateSource:
    """The template that data.template names, else the tokenizer's own; tried out before it is returned.

    Without `must_exist`, a tokenizer that has none gives the empty text.

    `tokenizer` is a Hugging Face tokenizer, typed Any because transformers is untyped. Beside a tokenizer that kitae
    saved lie the system prompt and stop ids it was trained with; they hold until a template file says otherwise.
    """
    if data.template is None:
        source = replace(_own(tokenizer, must_exist=must_exist), **_saved(tokenizer))
    elif data.template == "alpaca":
        text = ALPACA.replace("{{ bos }}", "{{ bos_token }}" if _adds_bos(tokenizer) else "")
        source = TemplateSource(text=text, origin="the alpaca template")
    else:
        source = _from_file(Path(data.template).expanduser())
    reason = why_unsafe(source.text)
    if reason is not None:
        raise ModelError(f"{source.origin} {reason}")
    return source


def saved_template(folder: str | Path) -> dict[str, Any] | None:
    """What kitae saved about the template in a model's folder, if it did."""
    path = Path(folder) / TEMPLATE_FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["system_prompt"], saved["stop_ids"], saved["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); save the model again or remove this file") from error
    return dict(saved)


def _own(tokenizer: Any, *, must_exist: bool) -> TemplateSource:
    text = tokenizer.chat_template
    if isinstance(text, dict):
        text = text.get("default")
    if not text and not must_exist:
        return TemplateSource(text="", origin=f"the tokenizer of {tokenizer.name_or_path or 'this model'}")
    if not text:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; set data.template to a "
            ".jinja file, a Colossal-AI conversation template, or alpaca"
        )
    return TemplateSource(text=text, origin="the tokenizer's chat template")


def _saved(tokenizer: Any) -> dict[str, Any]:
    saved = saved_template(tokenizer.name_or_path) if tokenizer.name_or_path else None
    if saved is None:
        return {}
    # Trained without a system prompt is a fact too: "" keeps a default from being put before what it learned.
    return {"system_prompt": saved["system_prompt"] or "", "stop_ids": tuple(saved["stop_ids"])}


def _from_file(path: Path) -> TemplateSource:
    if not path.is_file():
        raise ConfigError(
            f"data.template is {str(path)!r}, which is no file; name a .jinja or .json file, or alpaca"
        )
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_TEMPLATE_BYTES // 1024} KiB")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    return _colossal(text, path) if path.suffix == ".json" else TemplateSource(text=text, origin=str(path))


def _colossal(text: str, path: Path) -> TemplateSource:
    """Colossal-AI's conversation template: chat_template, system_message, stop_ids, response_format_tags."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("chat_template"), str):
        raise ConfigError(f"{path} has no chat_template; it should be a Colossal-AI conversation template")
    system, stop = content.get("system_message"), content.get("stop_ids", [])
    if (
        not isinstance(system, str | None)
        or not isinstance(stop, list)
        or not all(type(i) is int for i in stop)
    ):
        raise ConfigError(f"{path}: system_message must be text and stop_ids whole numbers")
    _check_tags(content.get("response_format_tags"), path)
    return TemplateSource(
        text=content["chat_template"], origin=str(path), system_prompt=system, stop_ids=tuple(stop)
    )


def _check_tags(tags: Any, path: Path) -> None:
    """The tags a file declares must be those that rewards and training use."""
    if tags is None:
        return
    given = [tag.get("text") for tag in tags.values()] if isinstance(tags, dict) else tags
    if not isinstance(given, list) or set(given) != set(TAGS):
        raise ConfigError(f"{path}: response_format_tags are {given}; only {', '.join(TAGS)} are known")


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
