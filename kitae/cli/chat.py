"""Talk to a model in the terminal: kitae chat MODEL, or kitae chat --endpoint URL --token T. /help shows the commands."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import Opened, UseSettings, open_model, require_unicode, warn_on_stderr
from kitae.cli._remote import Remote
from kitae.cli._stream import Stream
from kitae.config import require
from kitae.errors import ConfigError, KitaeError, RunDirError
from kitae.settings import read

HELP = (
    "/reset forgets the conversation, /fold hides or shows the thinking, /think shows the last one, /save FILE adds the "
    "conversation to a file of training rows, /exit (or Ctrl-D) ends, Ctrl-C stops an answer"
)
LOCAL_ONLY = ("template", "raw", "batch_size", "engine", "revision", "tokenizer", "dtype", "device", "quantization",
              "kv_cache_tokens", "trust_remote_code")  # fmt: skip
SENT = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size",
                                "stop")} | {"max_new_tokens": "max_tokens"}  # fmt: skip
"""Settings and what requests call them; a server is sent those that the user gave, and knows best about the others."""


class Settings(UseSettings):
    """Talk to a model in the terminal."""

    model: str = ""
    """A model folder, hub id, run or adapter; with endpoint the name of one of its models, by default the first."""
    max_new_tokens: int = Field(2048, ge=1)
    """Longest answer in tokens; less where the model's context ends. With endpoint the server's own limit, unless given."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as kitae serve's; default: the model is loaded here. The server is sent
    only the sampling settings that are given; the others are as it was started with."""
    token: str | None = None
    """The endpoint's token. Others on this machine can read a command line; token_file is safer."""
    token_file: str | None = None
    """File whose first line is the endpoint's token."""
    system: str | None = None
    """The same as system_prompt: a system turn put before the conversation."""
    no_think: bool = False
    """Tell the chat template that the model is not to think; only for templates that have such a switch."""
    fold: bool = False
    """Show of the thinking only how long it is; /fold in the chat turns it on and off."""


class Talker(Protocol):
    """Who answers: a model loaded here, or one behind an address."""

    def answer(self, messages: list[dict[str, str]], stream: Callable[[str], Stream], *, number: int) -> str:
        """Show an answer to a conversation on `stream(prefill)` as it grows, and return it, thinking included.

        `number` counts the questions; with the seed it makes answers repeatable.
        """
        ...


def main(argv: list[str]) -> int:
    """Read a line, answer it, until the end of input."""
    if _help.is_asked(argv):
        _help.show(Settings, prog="kitae chat [MODEL]")
        return 0
    use, notes = read("chat", Settings, argv, positional=("model",))
    warn_on_stderr(notes.warnings)
    use = _checked(use)
    talker: Talker
    if use.endpoint is None:
        talker, name = LocalTalker(open_model(use), use), use.model
    else:
        remote = Remote(use.endpoint, token=_token(use), model=use.model or None)
        talker, name = RemoteTalker(remote, use, said=notes.origins), remote.model
    print(f"{name}: {HELP}", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # a line that is not UTF-8 is refused, and the chat goes on
    conversation = Conversation(talker, folds=use.fold, system_prompt=use.system_prompt)
    while (line := _read_line()) is not None and line != "/exit":
        if line:
            _act(conversation, line)
    return 0


def _checked(use: Settings) -> Settings:
    require(not (use.system and use.system_prompt), "system and system_prompt are both set; leave one out")
    if use.system is not None:
        use = use.model_copy(update={"system_prompt": use.system})
    require_unicode(use.system_prompt or "", what="the system prompt")
    if use.endpoint is None:
        require(
            bool(use.model), "there is no model; write it after kitae chat, or name a server with --endpoint"
        )
        for name in ("token", "token_file"):
            require(getattr(use, name) is None, f"--{name} has no effect without --endpoint; leave it out")
        return use
    for name in LOCAL_ONLY:
        default = Settings.model_fields[name].get_default()
        require(getattr(use, name) == default, f"--{name} has no effect with --endpoint; leave it out")
    return use


def _token(use: Settings) -> str | None:
    require(not (use.token and use.token_file), "token and token_file are both set; leave one out")
    if use.token_file is None:
        return use.token
    try:
        return Path(use.token_file).expanduser().read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token_file: cannot read {use.token_file}: {error}") from error


class Conversation:
    """The turns so far; each answer is sampled after all of them."""

    def __init__(self, talker: Talker, *, folds: bool = False, system_prompt: str | None = None) -> None:
        """`system_prompt` is what the user gave the talker; it is saved with the turns, as answers come of it."""
        self._talker = talker
        self._system_prompt = system_prompt
        self.folds = folds
        self.messages: list[dict[str, str]] = []
        """With the thinking of every answer; what is shown to the model again is the talker's matter."""
        self._num_asked = 0

    def reset(self) -> None:
        """Start over: the same questions get the same answers again."""
        self.messages = []
        self._num_asked = 0

    def send(self, text: str) -> str:
        """Add a user turn, and show and return the answer. If that fails, the turn is not kept."""
        require_unicode(text, what="this turn")
        asked = [*self.messages, {"role": "user", "content": text}]
        self._num_asked += 1
        said = self._talker.answer(asked, self._stream, number=self._num_asked)
        self.messages = [*asked, {"role": "assistant", "content": said}]
        return said

    def thinking(self) -> str:
        """The thinking of the last answer."""
        last = self.messages[-1]["content"] if self.messages else ""
        thought, closing, _ = last.partition("</think>")
        return thought.removeprefix("<think>").strip() if closing or last.startswith("<think>") else ""

    def save(self, file: Path) -> None:
        """Add the conversation to a file as one line, as kitae train sft reads it."""
        require(bool(self.messages), "there is nothing to save yet")
        system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
        row = {"messages": system + self.messages}
        try:
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunDirError(f"cannot write {file}: {error.strerror or error}") from error

    def _stream(self, prefill: str) -> Stream:
        return Stream(sys.stdout, prefill=prefill, folds=self.folds)


class LocalTalker:
    """A model loaded in this process."""

    def __init__(self, opened: Opened, use: Settings) -> None:
        self._opened, self._use = opened, use
        if use.no_think:
            _require_switch(opened)

    def answer(self, messages: list[dict[str, str]], stream: Callable[[str], Stream], *, number: int) -> str:
        """See Talker. The template decides what of earlier answers the model sees again."""
        opened, use = self._opened, self._use
        problem = (
            opened.ask_raw(messages[-1]["content"])
            if use.raw
            else opened.ask(messages, thinks=not use.no_think)
        )
        room = (opened.context or sys.maxsize) - len(problem.token_ids)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(problem.token_ids)} tokens, which fills the model's context of "
                f"{opened.context}; /reset forgets it"
            )
        shown = stream(problem.prefill)
        shown.decode = opened.template.decode
        try:
            [[rollout]] = opened.engine.generate(
                [problem],
                n=1,
                sampling=use.sampling(max_new_tokens=min(use.max_new_tokens, room)),
                seed=use.seed + number,
                on_tokens=shown.on_tokens,
            )
        finally:
            shown.finish()
        return rollout.text


class RemoteTalker:
    """A model behind an address."""

    def __init__(self, remote: Remote, use: Settings, *, said: Collection[str]) -> None:
        """`said`: names of the settings that the user gave."""
        self._remote, self._use = remote, use
        self._fields: dict[str, Any] = {
            field: getattr(use, name) for name, field in SENT.items() if name in said
        }
        self._has_seed = "seed" in said
        if use.no_think:
            self._fields["chat_template_kwargs"] = {"enable_thinking": False, "thinking": False}

    def answer(self, messages: list[dict[str, str]], stream: Callable[[str], Stream], *, number: int) -> str:
        """See Talker. The model does not see its earlier thinking again."""
        sent = [{**turn, "content": without_thinking(turn)} for turn in messages]
        if self._use.system_prompt:
            sent.insert(0, {"role": "system", "content": self._use.system_prompt})
        shown = stream("")
        said = []
        try:
            seed = {"seed": self._use.seed + number} if self._has_seed else {}
            for piece in self._remote.stream(sent, **seed, **self._fields):
                said.append(piece)
                shown.add(piece)
        finally:
            shown.finish()
        return "".join(said)


def without_thinking(turn: dict[str, str]) -> str:
    """What a turn says after its thinking, if it has any."""
    if turn["role"] != "assistant":
        return turn["content"]
    before, closing, after = turn["content"].partition("</think>")
    return after.lstrip() if closing else "" if before.startswith("<think>") else before


def _require_switch(opened: Opened) -> None:
    question = [{"role": "user", "content": "Hi"}]
    require(
        opened.ask(question) != opened.ask(question, thinks=False),
        "--no_think: this model's chat template has no switch for thinking; leave it out",
    )


def _act(conversation: Conversation, line: str) -> None:
    """One line of the user: a command, or something to answer."""
    command, _, rest = line.partition(" ")
    try:
        if command == "/reset":
            conversation.reset()
            print("(forgotten)", file=sys.stderr)
        elif command == "/fold":
            conversation.folds = not conversation.folds
            print(f"(the thinking is {'hidden' if conversation.folds else 'shown'})", file=sys.stderr)
        elif command == "/think":
            print(conversation.thinking() or "(there is none)", file=sys.stderr)
        elif command == "/save":
            require(bool(rest.strip()), "/save needs a file name")
            conversation.save(Path(rest.strip()).expanduser())
            print(f"(added to {rest.strip()})", file=sys.stderr)
        elif command in ("/help", "/?"):
            print(HELP, file=sys.stderr)
        else:
            conversation.send(line)
    except KeyboardInterrupt:
        print("(stopped; this turn is not kept)", file=sys.stderr)
    except KitaeError as error:
        print(f"kitae: error: {error}", file=sys.stderr)


def _read_line() -> str | None:
    """A line of the user, or None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
