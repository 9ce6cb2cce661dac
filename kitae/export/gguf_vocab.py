"""A tokenizer as GGUF holds it: tokens with types, merges or scores, special ids, and the chat template.

tokenizer.json --vocabulary--> byte-level BPE ("gpt2"), sentencepiece-like BPE ("llama"), or single characters, which
are byte-level BPE whose merges only put the bytes of one character together.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from kitae.config import DataSettings
from kitae.data.chat import THINKING_ON, Template
from kitae.data.sandbox import FIXED_DATE
from kitae.errors import ModelError
from kitae.export.pretokenizers import EXPRESSIONS, find_pretokenizer

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types."""
NEVER = "<|no|> <|merge|>"
"""A merge of two texts that no token splits into: the format wants at least one."""
SET_BY_LLAMA_CPP = ("enable_thinking", "thinking")
"""Switches of chat.THINKING_ON that llama.cpp passes to templates by itself."""
DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""Where a template writes today's date."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What is written under tokenizer.ggml."""

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    adds_space: bool = False


def vocabulary(tokenizer: Any, *, size: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of a transformers PreTrainedTokenizerFast, filled up to the model's `size`; `pre` names what cuts."""
    core = tokenizer.backend_tokenizer
    spec = json.loads(core.to_str())
    model = spec["model"]
    if pre is not None and pre not in EXPRESSIONS:
        log.warning("pre_tokenizer %s is none that kitae can check; it is written as it stands", pre)
    parts = _parts(spec.get("pre_tokenizer"))
    if model["type"] == "BPE" and any(part["type"] == "ByteLevel" for part in parts):
        return Vocabulary(
            model="gpt2",
            pre=pre or find_pretokenizer(core),
            merges=[" ".join(_pair(merge)) for merge in model["merges"]] or [NEVER],
            **_tokens(spec, size, lambda text: text),
        )
    if model["type"] == "BPE" and model.get("byte_fallback"):
        filled = _tokens(spec, size, lambda text: text)
        return Vocabulary(
            model="llama",
            pre="default",
            scores=_scores(filled["tokens"], model["merges"]),
            adds_space=_adds_space(spec),
            **filled,
        )
    if _is_by_character(model, parts):
        texts = [text for text in model["vocab"] if len(text) == 1]
        merges = [merge for text in texts for merge in _merges_of_character(text)]
        return Vocabulary(
            model="gpt2",
            pre="gpt-2",
            merges=list(dict.fromkeys(merges)) or [NEVER],
            **_tokens(spec, size, _byte_level),
        )
    raise ModelError(
        f"kitae writes no GGUF of a tokenizer of type {model['type']} with pre-tokenizer "
        f"{[part['type'] for part in parts]}; it knows byte-level BPE, BPE with byte fallback, and single characters"
    )


def _tokens(spec: dict[str, Any], size: int, write: Any) -> dict[str, Any]:
    """Texts and types by id; `write` gives a token's text as GGUF has it."""
    model = spec["model"]
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, number in model["vocab"].items():
        tokens[number], types[number] = write(text), NORMAL
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[number] = BYTE
    if (unknown := model.get("unk_token")) in model["vocab"]:
        number = model["vocab"][unknown]
        tokens[number], types[number] = unknown, UNKNOWN
    for added in spec["added_tokens"]:
        if types[added["id"]] != UNKNOWN:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return {"tokens": tokens, "types": types}


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    found: list[dict[str, Any]] = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return found


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """What comes of an earlier merge has the higher score, as in sentencepiece."""
    found: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        found.setdefault("".join(_pair(merge)), -float(rank + 1))
    return [found.get(token, 0.0) for token in tokens]


def _adds_space(spec: dict[str, Any]) -> bool:
    text = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _is_by_character(model: dict[str, Any], parts: list[dict[str, Any]]) -> bool:
    cuts_all = len(parts) == 1 and parts[0].get("pattern") == {"Regex": "[\\s\\S]"}
    return model["type"] == "WordLevel" and cuts_all and parts[0]["behavior"] == "Isolated"


def _byte_level(text: str) -> str:
    """Each byte as a printable character, as GPT-2 writes them."""
    return "".join(_LETTERS[byte] for byte in text.encode())


def _merges_of_character(text: str) -> list[str]:
    letters = _byte_level(text)
    return [f"{letters[:i]} {letters[i]}" for i in range(1, len(letters))]


def _letters() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _letters()


# the template and its ids ----------------------------------------------------------------------------------------


def load_template(tokenizer: Any) -> Template | None:
    """The tokenizer's chat template with what the model was trained with; None where it has none."""
    if not tokenizer.chat_template:
        return None
    return Template.load(tokenizer, data=DataSettings())


def template_text(template: Template) -> str:
    """The chat template, so that llama.cpp renders as kitae does.

    A system prompt that the model was trained with is put in where a conversation has none; today's date is that of
    training; and a switch for thinking that llama.cpp does not know is on unless a program sets it.
    """
    head = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = true %}}{{%- endif %}}"
        for name in THINKING_ON
        if name not in SET_BY_LLAMA_CPP and re.search(rf"\b{name}\b", template.text)
    )
    if "date_string" in template.text:  # Llama 3's, to which llama.cpp gives today's date
        head += f"{{%- set date_string = '{FIXED_DATE:%d %b %Y}' %}}"
    if template.system_prompt is not None:
        literal = json.dumps(template.system_prompt, ensure_ascii=False)  # llama.cpp reads no \u escapes
        turn = "{'role': 'system', 'content': " + literal + "}"
        head += (
            "{%- if messages[0]['role'] != 'system' %}{%- set messages = ["
            + turn
            + "] + messages %}{%- endif %}"
        )
    return head + DATE.sub(lambda call: json.dumps(FIXED_DATE.strftime(call[2])), template.text)


def tokenizer_metadata(
    writer: Any, tokenizer: Any, template: Template | None, *, size: int, pre: str | None
) -> Vocabulary:
    """Write tokenizer, special ids and template to a gguf.GGUFWriter, which is typed Any because it is an extra's."""
    found = vocabulary(tokenizer, size=size, pre=pre)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.adds_space)
    eos = tokenizer.eos_token_id
    stop_ids = template.stop_ids if template is not None else []
    ends = [i for i in stop_ids if i != eos]
    if eos is None and ends:
        eos = ends.pop(0)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, eos),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_eot_token_id, ends[0] if ends else None),
        (writer.add_eom_token_id, ends[1] if len(ends) > 1 else None),
    ):
        if number is not None:
            add(number)
    if len(ends) > 2:
        log.warning("GGUF has a place for three ids that end a completion; ids %s are left out", ends[2:])
    around = tokenizer.backend_tokenizer.encode("a").ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and around[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(eos is not None and around[-1:] == [eos])
    if template is not None:
        writer.add_chat_template(template_text(template))
    return found
