"""The one template object: conversations to token ids for training, sampling, evaluation and serving alike.

    turns --cut out control tokens--> marked turns --chat template--> text --encode, put back--> ids, prefill

Each assistant turn is taught as it would be sampled: the turns before it rendered by the model's own template, which
may drop earlier thinking; then the prefill, such as R1's `<think>` and line feed, not taught; then the rest of the
turn and the end token, taught. Prompt and completion are encoded separately, as they are in sampling.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import xxhash

from kitae.config import DataSettings
from kitae.data.formats import Example, Message, RowError, is_taught
from kitae.data.sandbox import compile_template
from kitae.data.templates import TEMPLATE_FILE, TemplateSource, find_template, saved_template
from kitae.data.tokens import TAGS, Marks, TextEncoder
from kitae.errors import DataError, ModelError
from kitae.types import Problem, Row

log = logging.getLogger(__name__)

THINKING_ON = {"enable_thinking": True, "thinking": True, "open_thinking": True}
"""Names under which hybrid templates (Qwen3, DeepSeek-V3.1, minimind) ask whether the model is to think."""

_HOLE = "\ufffc"
"""Stands for a turn's content when the template is asked what it writes around it."""
_USER = {"role": "user", "content": "Hi"}


class Template:
    """A chat template bound to a tokenizer. Build it with `load`; it does not change afterwards."""

    def __init__(self, tokenizer: Any, *, source: TemplateSource, system_prompt: str | None) -> None:
        self.tokenizer = tokenizer
        self.text = source.text
        self.system_prompt = system_prompt or None
        """Put before every conversation that has no system turn."""
        self._encoder = TextEncoder(tokenizer)
        self._compiled = compile_template(source.text)
        self._origin = source.origin
        self.can_chat = bool(source.text)
        """False where the model has no chat template: it goes on from text, and every conversation is refused."""
        self._folds_system = False
        self._folds_system = not self._shows_system()
        self.prefill = self._find_prefill([_USER], {}) if self.can_chat else ""
        """The end of a rendered prompt that belongs to the completion; empty for most models."""
        self._head, tail = self._around_content() if self.can_chat else ("", "")
        self._end_ids = self._find_end(tail)
        known = [i for i in source.stop_ids if i in self._encoder.ids]
        if len(known) < len(source.stop_ids):
            unknown = sorted(set(source.stop_ids) - set(known))
            log.warning(
                "%s: stop_ids %s are no control tokens of this tokenizer; left out", source.origin, unknown
            )
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = sorted({self._end_ids[-1], *eos, *known})
        """Ids that end a completion: the template's end of turn, the tokenizer's eos, and the template file's."""
        self.keeps_think = self.decode(self.encode_completion("".join(TAGS))) == "".join(TAGS)
        self.fingerprint = self._fingerprint()

    @classmethod
    def load(
        cls,
        tokenizer: Any,
        *,
        data: DataSettings,
        default_system_prompt: str | None = None,
        must_chat: bool = True,
    ) -> Template:
        """The template for a tokenizer under these settings; without `must_chat` a model may have none.

        The system prompt is data.system_prompt where that is given (even empty), else that of the template file or
        of the saved run, else `default_system_prompt`: GRPO passes `form_instruction(...)` here.
        """
        source = find_template(tokenizer, data=data, must_exist=must_chat)
        prompts = (data.system_prompt, source.system_prompt, default_system_prompt)
        system_prompt = next((prompt for prompt in prompts if prompt is not None), None)
        try:
            template = cls(tokenizer, source=source, system_prompt=system_prompt)
            ids = template.prompt([_USER])[0] if template.can_chat else []
        except RowError as error:
            raise ModelError(str(error)) from error
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise ModelError(f"{source.origin} starts with two begin-of-sequence tokens")
        return template

    # prompts and completions ----------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], **kwargs: Any) -> tuple[list[int], str]:
        """Ids of the conversation up to where the assistant speaks, and the prefill its text ends with.

        `kwargs` go to the template, such as enable_thinking=False.
        """
        ids, prefill, _ = self._prompt(messages, kwargs)
        return ids, prefill

    def problem(self, example: Example, *, index: int, max_length: int | None) -> Problem | None:
        """The example's question, ready for sampling; None where it is longer than max_length tokens."""
        question = example.question
        ids, prefill = self._located(example, question)
        if max_length is not None and len(ids) > max_length:
            return None
        return Problem(
            prompt=question[-1]["content"],
            token_ids=ids,
            answer=example.answer,
            columns=example.columns,
            messages=question,
            prefill=prefill,
            index=index,
        )

    def rows(self, example: Example, *, max_length: int, counts: Counter[str] | None = None) -> list[Row]:
        """Training rows that teach every assistant turn of the example; none where max_length leaves no target.

        Usually that is one row. A template that rewrites earlier turns gives one row per turn, each with the context
        that the turn would really be sampled in. `counts` collects what was cut: rows_cut, answers_cut, rows_dropped,
        control_literals; and examples whose thinking ends without having begun: unopened_thinks.
        """
        counts = Counter() if counts is None else counts
        try:
            rows = self._whole_rows(example, counts)
        except RowError as error:
            raise DataError(f"{example.source}: {error}") from error
        return [row for row in (self._cut(row, max_length, counts) for row in rows) if row is not None]

    def completed(self, messages: Sequence[Message], text: str) -> Row:
        """A prompt and a completion of it, as a reward reads it, as one row that ends with the end of turn.

        It is rendered as `rows` would teach it; text that `rows` refuses, such as an unclosed think block, stays as it
        is. Raises RowError where the template refuses the prompt.
        """
        prompt, prefill, _ = self._prompt(messages, {})
        try:
            completion = self._completion(text, prefill)
        except RowError:
            completion = text.removeprefix(prefill)
        marks = Marks(self._encoder)
        said = marks.encode(marks.hide(completion, allowed=TAGS), is_start=False) + self._end_ids
        mask = [False] * len(prompt) + [True] * len(said)
        return Row(token_ids=prompt + said, loss_mask=mask, prompt_length=len(prompt))

    def encode_completion(self, text: str) -> list[int]:
        """Ids of assistant text, without the end token; of control tokens only think and answer tags arise."""
        return self._encoder.encode_text(text, allowed=TAGS)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids: think and answer tags stay, end, pad and other control tokens go."""
        return self._encoder.decode(ids)

    def text_of(self, ids: Sequence[int], prefill: str) -> str:
        """A completion as rewards and people read it: the prefill and what was sampled after it."""
        return prefill + self.decode(ids)

    # saving ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write tokenizer, chat template, and what else a later user of the model must know."""
        self.tokenizer.chat_template = self.text
        self.tokenizer.save_pretrained(folder)
        saved = {
            "system_prompt": self.system_prompt,
            "stop_ids": self.stop_ids,
            "fingerprint": self.fingerprint,
        }
        path = Path(folder) / TEMPLATE_FILE
        path.write_text(json.dumps(saved, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def differences(self, folder: str | Path) -> list[str]:
        """How this template differs from the one a model was saved with, one clause each; none if it does not."""
        saved = saved_template(folder)
        if saved is None or saved["fingerprint"] == self.fingerprint:
            return []
        fields = {"system_prompt": self.system_prompt, "stop_ids": self.stop_ids}
        found = [f"{k} was {saved[k]!r} and is {v!r}" for k, v in fields.items() if saved[k] != v]
        return found or ["the chat template or the control tokens changed"]

    # how it is done -------------------------------------------------------------------------------------------

    def _prompt(self, messages: Sequence[Message], kwargs: dict[str, Any]) -> tuple[list[int], str, int]:
        marks = Marks(self._encoder)
        turns = [self._hidden(turn, marks) for turn in self._with_system(messages)]
        text = self._render(turns, add_generation_prompt=True, **kwargs)
        prefill = self._find_prefill(turns, kwargs) if kwargs else self.prefill
        ids = marks.encode(text)
        if not ids:
            raise RowError("the conversation renders to no tokens at all")
        return ids, prefill if text.endswith(prefill) else "", marks.num_control

    def _located(self, example: Example, messages: Sequence[Message]) -> tuple[list[int], str]:
        try:
            return self.prompt(messages)
        except RowError as error:
            raise DataError(f"{example.source}: {error}") from error

    def _hidden(self, turn: Message, marks: Marks) -> Message:
        allowed = TAGS if turn["role"] == "assistant" else ()
        return {"role": turn["role"], "content": marks.hide(turn["content"], allowed=allowed)}

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        turns = list(messages)
        if self.system_prompt and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        if self._folds_system and turns[0]["role"] == "system" and len(turns) > 1:
            system, user, *rest = turns
            turns = [{**user, "content": f"{system['content'].rstrip()}\n\n{user['content']}"}, *rest]
        return turns

    def _render(self, turns: Sequence[Message], *, add_generation_prompt: bool, **kwargs: Any) -> str:
        context = {
            **self.tokenizer.special_tokens_map,
            "tools": None,
            "documents": None,
            **THINKING_ON,
            **kwargs,
        }
        if not self.can_chat:
            raise RowError(f"{self._origin} has no chat template")
        try:
            return self._compiled.render(
                messages=list(turns), add_generation_prompt=add_generation_prompt, **context
            )
        except jinja2.TemplateError as error:
            raise RowError(f"{self._origin} refuses this conversation: {error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise RowError(f"{self._origin} fails on this conversation: {error}") from error

    def _whole_rows(self, example: Example, counts: Counter[str]) -> list[Row]:
        rows: list[Row] = []
        num_control = 0
        is_unopened = False
        for k, turn in enumerate(example.messages):
            if not is_taught(turn):
                continue
            prompt, prefill, num_hidden = self._prompt(example.messages[:k], {})
            marks = Marks(self._encoder)
            completion = self._completion(turn["content"], prefill)
            thinking, closing, _ = (prefill + completion).partition("</think>")
            is_unopened |= bool(closing) and "<think>" not in thinking
            target = marks.encode(marks.hide(completion, allowed=TAGS), is_start=False) + self._end_ids
            num_control = num_hidden + marks.num_control
            before = rows[-1] if rows else None
            if before is not None and prompt[: len(before.token_ids)] == before.token_ids:
                rows.pop()
                gap = len(prompt) - len(before.token_ids)
                mask = before.loss_mask + [False] * gap + [True] * len(target)
                rows.append(
                    Row(token_ids=prompt + target, loss_mask=mask, prompt_length=before.prompt_length)
                )
            else:
                mask = [False] * len(prompt) + [True] * len(target)
                rows.append(Row(token_ids=prompt + target, loss_mask=mask, prompt_length=len(prompt)))
        if num_control:
            counts["control_literals"] += num_control
        if is_unopened:
            counts["unopened_thinks"] += 1
        return rows

    def _completion(self, content: str, prefill: str) -> str:
        """What the model would have to sample after the prefill for the turn to read like `content`."""
        thinks = "</think>" in content
        if "<think>" in content and not thinks:
            raise RowError("an assistant turn opens <think> and never closes it")
        if thinks and not self.keeps_think:
            raise RowError(
                "this tokenizer cannot write <think> and read it back; use another model or template"
            )
        if "</think>" in prefill:
            if thinks:
                raise RowError(
                    f"{self._origin} starts each turn with a closed think block; this one has its own"
                )
            return content
        if prefill and thinks:
            after_tag = content.lstrip().removeprefix("<think>")
            if "<think>" in after_tag.partition("</think>")[0]:
                raise RowError(f"{self._origin} starts each turn with <think>; this one has text before it")
            return after_tag.removeprefix(prefill.removeprefix("<think>"))
        if prefill:
            closing = self._head.removeprefix(prefill) if self._head.startswith(prefill) else ""
            return (closing or "\n</think>\n\n") + content
        return content if thinks and "<think>" in self._head else self._head + content

    def _cut(self, row: Row, max_length: int, counts: Counter[str]) -> Row | None:
        if len(row.token_ids) <= max_length:
            return row
        counts["rows_cut"] += 1
        kept = row.token_ids[:max_length]
        if self.decode(kept).count("</answer>") < self.decode(row.token_ids).count("</answer>"):
            counts["answers_cut"] += 1
        mask = row.loss_mask[:max_length]
        if not any(mask):
            counts["rows_dropped"] += 1
            return None
        return Row(token_ids=kept, loss_mask=mask, prompt_length=row.prompt_length)

    # what the template does, asked once -----------------------------------------------------------------------

    def _shows_system(self) -> bool:
        """Whether the template writes a system turn; one that refuses or drops it gets it in the user's turn."""
        try:
            turns = [{"role": "system", "content": _HOLE}, _USER]
            return _HOLE in self._render(turns, add_generation_prompt=True)
        except RowError:
            return False

    def _find_prefill(self, turns: Sequence[Message], kwargs: dict[str, Any]) -> str:
        """What follows the assistant's role marker in the generation prompt, from `<think>` on."""
        text = self._render(turns, add_generation_prompt=True, **kwargs)
        without = self._render(turns, add_generation_prompt=False, **kwargs)
        same = next((i for i, (a, b) in enumerate(zip(text, without, strict=False)) if a != b), len(without))
        start = text.find("<think>", same)
        return text[start:] if start >= 0 else ""

    def _around_content(self) -> tuple[str, str]:
        """What the template writes between prompt (without prefill) and content of a last turn, and after it."""
        prompt = self._render([_USER], add_generation_prompt=True).removesuffix(self.prefill)
        answered = [_USER, {"role": "assistant", "content": _HOLE}]
        before, hole, after = self._render(answered, add_generation_prompt=False).partition(_HOLE)
        if not hole:
            raise ModelError(f"{self._origin} does not write assistant turns")
        return before.removeprefix(prompt) if before.startswith(prompt) else "", after

    def _find_end(self, tail: str) -> list[int]:
        """Ids that close a turn: what the template writes after it up to its first control token, else eos."""
        ids = Marks(self._encoder).encode(tail, is_start=False)
        for i, token in enumerate(ids):
            if token in self._encoder.ids:
                return ids[: i + 1]
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"{self._origin} does not end a turn with a control token, and the tokenizer has no eos"
            )
        return [self.tokenizer.eos_token_id]

    def _fingerprint(self) -> str:
        parts = [self.text, self.system_prompt, self.stop_ids, sorted(self._encoder.control_ids.items())]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
