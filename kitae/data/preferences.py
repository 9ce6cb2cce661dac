"""Preference rows to Examples: a prompt with a chosen and a rejected completion, or a completion with a label.

record --column mapping--> prompt turns, completions --checks--> Example with `rejected` or `label`
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from kitae.config import DataSettings
from kitae.data.formats import (
    QUESTIONS,
    Example,
    Message,
    Purpose,
    RowError,
    checked_turns,
    instruction_turns,
    kind_of,
    system_turn,
    turn_of,
    turns_of,
    with_our_names,
)

CONVERSATIONS = ("messages", "conversations", "conversation")
COMPLETIONS = ("completion", "response", "output")
LABELS = ("label", "kto_tag")
_USED = {"answer", "chosen", "rejected", "prompt", *CONVERSATIONS, *COMPLETIONS, *LABELS}
_WORDS = {"true": True, "1": True, "false": False, "0": False}
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""How transcripts written as one text mark their turns (Anthropic's hh-rlhf)."""


def to_preference(record: Any, *, data: DataSettings, purpose: Purpose, source: str = "") -> Example:
    """Recognise the record's shape and check it; raises RowError with the reason.

    `purpose` pairs wants chosen and rejected; labels takes such pairs too, and completions with a true/false label.
    The prompt is a column, or the turns that chosen and rejected have in common before their last.
    """
    if not isinstance(record, dict):
        raise RowError(f"expected an object, found {kind_of(record)}")
    record = {
        name: value for name, value in with_our_names(record, data.columns).items() if value is not None
    }
    columns = {name: value for name, value in record.items() if name not in _USED}
    label_column = next((name for name in LABELS if name in record), None)
    if "chosen" in record and "rejected" in record:
        messages, rejected = _pair(record)
        return Example(messages=messages, rejected=rejected, columns=columns, source=source)
    if purpose == "labels" and label_column is not None:
        label = _truth(record[label_column], label_column)
        return Example(messages=_labelled(record), label=label, columns=columns, source=source)
    wanted = "chosen and rejected" + (", or a completion and its label" if purpose == "labels" else "")
    found = ", ".join(map(str, record)) or "none"
    hint = "; rows with a label are for kto" if label_column is not None and purpose == "pairs" else ""
    raise RowError(f"no preference: needs the columns {wanted}; found {found} (see data.columns){hint}")


def _pair(record: dict[str, Any]) -> tuple[list[Message], str]:
    """The turns up to the chosen completion, and the rejected one."""
    prompt = _prompt(record)
    chosen = _conversation(prompt, _completion(record, "chosen"), record, "chosen")
    rejected = _conversation(prompt, _completion(record, "rejected"), record, "rejected")
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise RowError("chosen and rejected differ before their last turn: a pair needs one shared prompt")
    if chosen[-1] == rejected[-1]:
        raise RowError("chosen and rejected are identical: such a pair teaches nothing")
    return chosen, rejected[-1]["content"]


def _labelled(record: dict[str, Any]) -> list[Message]:
    """The turns up to the completion that a label speaks of: a column, or the last turn of the conversation."""
    column = next((name for name in COMPLETIONS if name in record), None)
    if column is not None:
        return _conversation(_prompt(record), _completion(record, column), record, column)
    name = next((name for name in CONVERSATIONS if name in record), None)
    if name is None:
        raise RowError(f"a label without a completion: no column named {', '.join(COMPLETIONS)} or messages")
    return _conversation(None, turns_of(record[name], name), record, name)


def _prompt(record: dict[str, Any]) -> list[Message] | None:
    """The turns that a prompt column holds, without a system turn from its own column; None where there is none."""
    for name in CONVERSATIONS:
        if name in record:
            return turns_of(record[name], name)
    if isinstance(record.get("context"), list):  # Colossal-AI's name for the turns before the pair
        return turns_of(record["context"], "context")
    if "instruction" in record:
        asked = {name: value for name, value in record.items() if name not in ("output", "system")}
        return instruction_turns(asked)
    for name in QUESTIONS:
        if name in record:
            value = _parsed(record[name])
            user = {"role": "user", "content": value, "field": name}
            return turns_of(value, name) if isinstance(value, list) else [user]
    return None


def _completion(record: dict[str, Any], name: str) -> list[Message]:
    """A completion's turns: from text, a turn, a list of turns, their JSON text, or a transcript."""
    value = _parsed(record[name])
    if isinstance(value, list):
        return turns_of(value, name)
    if isinstance(value, dict):
        return [turn_of(value, name)]
    if isinstance(value, str) and _TRANSCRIPT.match(value):
        _, *parts = _TRANSCRIPT.split(value)
        roles = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": roles[speaker], "content": text.strip(), "field": name}
            for speaker, text in zip(parts[::2], parts[1::2], strict=True)
        ]
    return [{"role": "assistant", "content": value, "field": name}]


def _conversation(
    prompt: list[Message] | None, completion: list[Message], record: dict[str, Any], name: str
) -> list[Message]:
    """All turns up to the completion, which is the last; earlier assistant turns are context only."""
    if not completion:
        raise RowError("no turns", field=name)
    is_whole = completion[0]["role"] in ("user", "human", "system")
    if not is_whole and prompt is None:
        raise RowError(
            f"no prompt: neither a column named {', '.join((*CONVERSATIONS, 'instruction', *QUESTIONS))} nor turns "
            f"before the last one",
            field=name,
        )
    turns = completion if is_whole else [*(prompt or []), *completion]
    if turns[0]["role"] != "system":
        turns = system_turn(record) + turns
    turns = checked_turns(turns)
    if turns[-1]["role"] != "assistant":
        raise RowError("the last turn must be the assistant's", field=name)
    if (
        is_whole
        and prompt is not None
        and _without_system(turns[:-1]) != _without_system(checked_turns(prompt))
    ):
        raise RowError("the prompt column and the turns before the last one differ", field=name)
    *context, last = turns
    return [
        *({**turn, "taught": False} if turn["role"] == "assistant" else turn for turn in context),
        {"role": "assistant", "content": last["content"]},
    ]


def _without_system(turns: Sequence[Message]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in turns if turn["role"] != "system"]


def _parsed(value: Any) -> Any:
    """Turns written as JSON text, as CSV files hold them; any other text is itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    turns = found if isinstance(found, list) else [found]
    is_turns = all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in turns)
    return found if turns and is_turns else value


def _truth(value: Any, column: str) -> bool:
    """A label as true or false; 1, 0 and their text are taken too."""
    word = str(value).strip().lower() if isinstance(value, str | bool | int) else ""
    if isinstance(value, float) and value in (0.0, 1.0):
        return bool(value)
    if word not in _WORDS:
        raise RowError(f"a label must be true or false, not {value!r}", field=column)
    return _WORDS[word]
