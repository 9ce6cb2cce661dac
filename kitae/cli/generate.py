"""Complete prompts: kitae generate MODEL "a prompt" [--raw] [--n 4] [--max_new_tokens 512]."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import (
    Opened,
    UseSettings,
    open_model,
    read_prompts,
    require_unicode,
    warn_on_stderr,
)
from kitae.cli._output import write_json
from kitae.cli._stream import Stream
from kitae.config import require
from kitae.settings import read

if TYPE_CHECKING:
    from kitae.types import Rollout


class Settings(UseSettings):
    """Complete prompts with a model."""

    prompt: list[str] = Field(default_factory=list)
    """The prompts; words after the model are prompts too."""
    prompts_file: str | None = None
    """A text file with one prompt a line; - is standard input."""
    n: int = Field(1, ge=1)
    """Completions of each prompt."""
    json_file: str | None = None
    """Also write prompts and completions to this file as JSON (--json FILE)."""


def main(argv: list[str]) -> int:
    """Print completions as they are sampled."""
    if _help.is_asked(argv):
        _help.show(Settings, prog="kitae generate MODEL [PROMPT ...]")
        return 0
    use, notes = read("generate", Settings, argv, positional=("model", "prompt"))
    warn_on_stderr(notes.warnings)
    prompts = prompts_of(use)
    opened = open_model(use)
    groups = complete(opened, use, prompts, show=use.n * len(prompts) == 1)
    if use.n * len(prompts) > 1:
        show_all(groups)
    if use.json_file:
        results = [
            {
                "prompt": prompt,
                "completions": [r.text for r in group],
                "finish_reasons": [r.finish_reason for r in group],
            }
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        write_json(use.json_file, {"model": use.model, "results": results})
    return 0


def prompts_of(use: Settings) -> list[str]:
    """The prompts of words, flags and file."""
    prompts = list(use.prompt)
    for prompt in prompts:
        require_unicode(prompt, what="a prompt")
    if use.prompts_file:
        prompts += read_prompts(use.prompts_file)
    require(
        bool(prompts),
        "there is no prompt; write it after the model, or name a file with --prompts_file (- is standard input)",
    )
    return prompts


def complete(opened: Opened, use: Settings, prompts: list[str], *, show: bool = False) -> list[list[Rollout]]:
    """n completions of each prompt; `show` streams the only one to standard output."""
    if use.raw:
        problems = [opened.ask_raw(text, index=i) for i, text in enumerate(prompts)]
    else:
        turns = [[{"role": "user", "content": text}] for text in prompts]
        problems = [opened.ask(messages, index=i) for i, messages in enumerate(turns)]
    how: dict[str, Any] = {"n": use.n, "sampling": use.sampling(), "seed": use.seed}
    if not show:
        return opened.engine.generate(problems, **how)
    stream = Stream(sys.stdout, decode=opened.template.decode, prefill=problems[0].prefill)
    groups = opened.engine.generate(problems, **how, on_tokens=stream.on_tokens)
    stream.finish()
    return groups


def show_all(groups: list[list[Rollout]]) -> None:
    """Print every completion; on a terminal under a thin line that says which one it is."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for prompt, group in enumerate(groups, start=1):
        for number, rollout in enumerate(group, start=1):
            if console.is_terminal:
                of_prompt = f"prompt {prompt} of {len(groups)}, " if len(groups) > 1 else ""
                console.rule(
                    Text(f"{of_prompt}completion {number} of {len(group)}", style="dim"), style="dim"
                )
            print(rollout.text)


def completions(given: dict[str, Any]) -> list[str]:
    """What kitae.generate returns: texts, n for each prompt in order."""
    use, notes = read("generate", Settings, given)
    warn_on_stderr(notes.warnings)
    groups = complete(open_model(use), use, prompts_of(use))
    return [rollout.text for group in groups for rollout in group]
