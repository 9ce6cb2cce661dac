"""From the shapes people keep their rows in to one: turns, a gold answer, and the other columns.

record --column mapping--> record of our names --shape by its keys--> Example
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from kitae.config import DataSettings
from kitae.errors import DataError

Message = dict[str, Any]
"""One turn: role and content; "taught": False on an assistant turn that is context only."""

Purpose = Literal["sft", "rl", "pairs", "labels"]
"""What rows are read for; "pairs" and "labels" are preferences (kitae/data/preferences.py)."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}
QUESTIONS = ("prompt", "problem", "question")
RESERVED = {"prompt", "completion", "answer"}
"""Names that a reward function's own arguments have."""


class RowError(DataError):
    """Why one row cannot be used; `field` is where in the row."""

    def __init__(self, reason: str, *, field: str = "") -> None:
        super().__init__(f"{reason} ({field})" if field else reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of a data set, whatever shape it had."""

    messages: list[Message]
    answer: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    """File and line, for messages to people."""
    rejected: str | None = None
    """Of a preference pair: what should not have been the last turn's content; messages end with the chosen one."""
    label: bool | None = None
    """Of a labelled row: whether the last turn is a good one."""

    @property
    def question(self) -> list[Message]:
        """The turns up to the last user turn: what a model is asked."""
        last = max(i for i, turn in enumerate(self.messages) if turn["role"] == "user")
        return self.messages[: last + 1]


def to_example(
    record: Any, *, data: DataSettings, purpose: Purpose = "sft", need_answer: bool = False, source: str = ""
) -> Example:
    """Recognise the record's shape and check it; raises RowError with the reason.

    `purpose` sft wants at least one assistant turn to teach; rl wants a question. `need_answer` also wants a gold
    answer, as the built-in rewards do.
    """
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise RowError(f"expected an object or a list of turns, found {kind_of(record)}")
    record = {
        name: value for name, value in with_our_names(record, data.columns).items() if value is not None
    }
    messages, answer, worked = _read(record)
    messages = checked_turns(messages)
    answer = _answer_text(answer) or _answer_of_target(messages)
    if purpose == "sft":
        messages = _with_target(messages, answer=answer, worked=worked, target=data.target)
        if not any(is_taught(turn) for turn in messages):
            raise RowError("nothing to teach: the row has no assistant turn or solution")
    if need_answer and answer is None:
        raise RowError("no answer: neither an answer column nor \\boxed{}, <answer> or #### in the solution")
    used = {"messages", "conversations", "conversation", *RESERVED}
    columns = {name: value for name, value in record.items() if name not in used}
    return Example(messages=messages, answer=answer, columns=columns, source=source)


def is_taught(turn: Message) -> bool:
    """Whether a turn is a target of supervised fine-tuning."""
    return turn["role"] == "assistant" and bool(turn.get("taught", True))


def extract_answer(text: str) -> str | None:
    """The final answer a solution states: the last <answer> block, else the last \\boxed{}, else after ####.

    Example: "so $x = \\boxed{\\frac{1}{2}}$" gives "\\frac{1}{2}".
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end].strip() or None
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    return _after_mark(text)[1]


def _after_mark(text: str) -> tuple[str, str | None]:
    """What stands before and after GSM8K's last ####; a heading, with more lines below it, is no answer."""
    before, mark, after = text.rpartition("####")
    final = after.strip()
    return (before, final) if mark and final and "\n" not in final else (text, None)


def has_tags(text: str) -> bool:
    """Whether a text already has a think or answer tag."""
    return any(tag in text for tag in ("<think>", "</think>", "<answer>", "</answer>"))


# shapes -------------------------------------------------------------------------------------------------------


def _read(record: dict[str, Any]) -> tuple[list[Message], Any, bool]:
    """Turns, the answer column, and whether the last turn is a worked solution."""
    if "chosen" in record and "rejected" in record:
        raise RowError("a preference row: chosen and rejected are for dpo, simpo, orpo, kto and reward_model")
    if isinstance(record.get("label"), bool) and "completion" in record:
        raise RowError("a preference row: a completion with a true/false label is for kto", field="label")
    for name in ("messages", "conversations", "conversation"):
        if name in record:
            turns = turns_of(record[name], name)
            system = system_turn(record)
            return (system + turns if system else turns), record.get("answer"), False
    if "instruction" in record:
        return instruction_turns(record), record.get("answer"), False
    for name in QUESTIONS:
        if name in record:
            return _question(record, name)
    known = "messages, conversations, instruction, prompt, problem or question"
    raise RowError(
        f"no column named {known}; found {', '.join(map(str, record)) or 'none'} (see data.columns)"
    )


def instruction_turns(record: dict[str, Any]) -> list[Message]:
    """Alpaca's shape: instruction, input, output, with LLaMA-Factory's system and history."""
    turns = system_turn(record)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise RowError("expected a list of pairs of instruction and output", field="history")
    for pair in history:
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    text, more = record["instruction"], record.get("input")
    if isinstance(text, str) and isinstance(more, str) and more.strip():
        text = f"{text}\n{more}"
    turns.append({"role": "user", "content": text, "field": "instruction"})
    if "output" in record:
        turns.append({"role": "assistant", "content": record["output"], "field": "output"})
    return turns


def _question(record: dict[str, Any], name: str) -> tuple[list[Message], Any, bool]:
    """A question under one of its names, and what answers it."""
    value = record[name]
    turns = system_turn(record)
    turns += (
        turns_of(value, name)
        if isinstance(value, list)
        else [{"role": "user", "content": value, "field": name}]
    )
    answer = record.get("answer")
    for column in ("completion", "solution", "response", "output"):
        if column in record:
            text = record[column]
            if isinstance(text, list):
                return turns + turns_of(text, column), answer, False
            turns.append({"role": "assistant", "content": text, "field": column})
            return turns, answer, column == "solution"
    text = _answer_text(answer)
    if text is None:
        return turns, None, False
    worked, final = _after_mark(text)
    turns.append({"role": "assistant", "content": text, "field": "answer"})
    return turns, final or text, final is not None and bool(worked.strip())


def system_turn(record: dict[str, Any]) -> list[Message]:
    """A system turn from the column system, if it says anything."""
    value = record.get("system")
    return [{"role": "system", "content": value, "field": "system"}] if value not in (None, "") else []


def turns_of(value: Any, name: str) -> list[Message]:
    """A list of turns as OpenAI or ShareGPT write them; also its JSON text, as CSV files hold it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"not a list of turns: {error}", field=name) from error
    if not isinstance(value, list):
        raise RowError(f"expected a list of turns, found {kind_of(value)}", field=name)
    return [turn_of(turn, f"{name}[{i}]") for i, turn in enumerate(value)]


def turn_of(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"expected a turn with role and content, found {kind_of(turn)}", field=where)
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise RowError("a turn without role", field=where)
    if turn.get("tool_calls") or turn.get("function_call"):
        raise RowError("tool calls cannot be taught yet", field=where)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    thoughts = turn.get("reasoning_content") or turn.get("thinking")
    if isinstance(thoughts, str) and isinstance(content, str):
        content = f"<think>\n{thoughts}\n</think>\n\n{content}"
    message = {"role": role, "content": content, "field": where}
    weight = turn.get("weight", turn.get("loss_weight"))
    if weight not in (None, 0, 1):
        raise RowError(f"a turn's weight must be 0 or 1, not {weight!r}", field=where)
    if weight == 0:
        message["taught"] = False
    return message


def _part(part: Any, where: str) -> str:
    text = part.get("text", part.get("value")) if isinstance(part, dict) else None
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(text, str):
        raise RowError("content may only have parts of type text", field=where)
    return text


# checks -------------------------------------------------------------------------------------------------------


def checked_turns(turns: list[Message]) -> list[Message]:
    """The turns with our role names, or the first thing that is wrong with them."""
    checked: list[Message] = []
    for i, turn in enumerate(turns):
        where = turn.get("field", f"turn {i}")
        role = ROLES.get(turn["role"]) if isinstance(turn["role"], str) else None
        if role is None:
            raise RowError(f"unknown role {turn['role']!r}; known are {', '.join(ROLES)}", field=where)
        content = turn["content"]
        if not isinstance(content, str):
            raise RowError(f"content must be text, found {kind_of(content)}", field=where)
        if role == "system" and not content.strip():
            continue
        if not content.strip():
            raise RowError("empty content", field=where)
        before = checked[-1]["role"] if checked else None
        if role == "system" and before is not None:
            raise RowError("a system turn may only come first, and once", field=where)
        if role in ("assistant", "tool") and before in (None, "system"):
            raise RowError(
                f"the first turn after the system turn must be the user's, not {role}", field=where
            )
        if role == before != "tool":
            raise RowError(f"two {role} turns in a row", field=where)
        kept = {"taught": False} if role == "assistant" and not turn.get("taught", True) else {}
        checked.append({"role": role, "content": content, **kept})
    if not any(turn["role"] == "user" for turn in checked):
        raise RowError("no user turn")
    return checked


def _answer_text(answer: Any) -> str | None:
    """The answer column as text; 43.0 reads 43. None where it is empty."""
    if answer is None or isinstance(answer, str):
        return (answer or "").strip() or None
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    raise RowError(f"the answer must be text or a number, found {kind_of(answer)}", field="answer")


def _answer_of_target(messages: list[Message]) -> str | None:
    last = messages[-1]
    return extract_answer(last["content"]) if last["role"] == "assistant" else None


def _with_target(
    messages: list[Message],
    *,
    answer: str | None,
    worked: bool,
    target: Literal["auto", "think_answer", "as_is"],
) -> list[Message]:
    """A worked solution without tags becomes think and answer blocks, where the setting and the row ask for it."""
    last = messages[-1]
    is_plain = last["role"] == "assistant" and not has_tags(last["content"])
    if not is_plain or target == "as_is" or (target == "auto" and not (worked and answer is not None)):
        return messages
    if answer is None:
        raise RowError("data.target is think_answer, but the row has no answer")
    solution = last["content"]
    if solution.strip() == answer:
        raise RowError(
            "data.target is think_answer, but the row has an answer only, no solution to think with"
        )
    before, final = _after_mark(solution)
    if final == answer:
        solution = before.rstrip()
    text = f"<think>{solution}</think><answer>{answer}</answer>"
    return [*messages[:-1], {**last, "content": text}]


def with_our_names(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The record with the user's columns under our names; `answer = "reward.truth"` reaches into an object."""
    if not columns:
        return record
    mapped = {name: value for name, value in record.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        value: Any = record
        for key in [theirs] if theirs in record else theirs.split("."):
            if not isinstance(value, dict) or key not in value:
                raise RowError(f"no column {theirs!r}, which data.columns.{ours} names")
            value = value[key]
        mapped[ours] = value
    return mapped


def _last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{} whose braces close."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    while start >= 0:
        brace = text.find("{", start)
        if brace >= 0 and not text[start:brace].removeprefix("\\boxed").removeprefix("\\fbox").strip():
            depth = 0
            for i in range(brace, len(text)):
                depth += {"{": 1, "}": -1}.get(text[i], 0) if text[i - 1] != "\\" else 0
                if depth == 0:
                    return text[brace + 1 : i].strip() or None
        start = max(text.rfind("\\boxed", 0, start), text.rfind("\\fbox", 0, start))
    return None


def kind_of(value: Any) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true/false",
        type(None): "null",
    }
    return names.get(type(value), "a number")
