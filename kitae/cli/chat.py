"""Talk to a model in the terminal: kitae chat MODEL. The thinking is dimmed; /reset forgets, /exit ends."""

from __future__ import annotations

import sys

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import Opened, UseSettings, open_model, warn_on_stderr
from kitae.cli._stream import Stream
from kitae.errors import ConfigError, KitaeError
from kitae.settings import read

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer"


class Settings(UseSettings):
    """Talk to a model in the terminal."""

    max_new_tokens: int = Field(2048, ge=1)
    """Longest answer in tokens; less where the model's context ends."""


def main(argv: list[str]) -> int:
    """Read a line, answer it, until the end of input."""
    if _help.is_asked(argv):
        _help.show(Settings, prog="kitae chat MODEL")
        return 0
    use, notes = read("chat", Settings, argv, positional=("model",))
    warn_on_stderr(notes.warnings)
    opened = open_model(use)
    print(f"{use.model}: {HELP}", file=sys.stderr)
    conversation = Conversation(opened, use)
    while (line := _read_line()) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            print("(forgotten)", file=sys.stderr)
        elif line.startswith("/") and line.split()[0] in ("/help", "/?"):
            print(HELP, file=sys.stderr)
        elif line:
            _answer(conversation, line)
    return 0


class Conversation:
    """The turns so far; each answer is sampled after all of them, rendered by the template."""

    def __init__(self, opened: Opened, use: Settings) -> None:
        self._opened, self._use = opened, use
        self.messages: list[dict[str, str]] = []
        self._num_asked = 0

    def reset(self) -> None:
        """Start over: the same questions get the same answers again."""
        self.messages = []
        self._num_asked = 0

    def send(self, text: str) -> str:
        """Add a user turn, and show and return the answer. If that fails, the turn is not kept."""
        opened, use = self._opened, self._use
        asked = [*self.messages, {"role": "user", "content": text}]
        problem = opened.ask_raw(text) if use.raw else opened.ask(asked)
        room = (opened.context or sys.maxsize) - len(problem.token_ids)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(problem.token_ids)} tokens, which fills the model's context of "
                f"{opened.context}; /reset forgets it"
            )
        self._num_asked += 1
        stream = Stream(sys.stdout, decode=opened.template.decode, prefill=problem.prefill)
        try:
            [[rollout]] = opened.engine.generate(
                [problem],
                n=1,
                sampling=use.sampling(max_new_tokens=min(use.max_new_tokens, room)),
                seed=use.seed + self._num_asked,
                on_tokens=stream.on_tokens,
            )
        finally:
            stream.finish()
        self.messages = [*asked, {"role": "assistant", "content": rollout.text}]
        return rollout.text


def _answer(conversation: Conversation, line: str) -> None:
    try:
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
