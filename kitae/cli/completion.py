"""Shell completion: kitae completion bash|zsh|fish prints a script for your shell."""

from __future__ import annotations

import importlib
import shlex

from kitae.errors import ConfigError
from kitae.plugins import did_you_mean, names_in
from kitae.settings import settings_class
from kitae.settings.fields import settings_of

HOW = {
    "bash": "source <(kitae completion bash)        # in ~/.bashrc",
    "zsh": "source <(kitae completion zsh)         # in ~/.zshrc, after compinit",
    "fish": "kitae completion fish | source         # in ~/.config/fish/config.fish",
}


def main(argv: list[str]) -> int:
    """Print the script."""
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join(["usage: kitae completion bash|zsh|fish", "", *HOW.values()]))
        return 0
    shell = argv[0]
    if shell not in HOW:
        raise ConfigError(f"no completion for {shell!r}; {did_you_mean(shell, HOW)}")
    print(_fish() if shell == "fish" else _bash(is_zsh=shell == "zsh"))
    return 0


def words() -> dict[tuple[str, ...], list[str]]:
    """What may follow each beginning of a command line."""
    commands = [name for name in names_in("kitae.cli") if name != "main"]
    recipes = names_in("kitae.recipes")
    found = {
        (): [*commands, "--help", "--version"],
        ("train",): recipes,
        ("launch",): ["--nproc_per_node", "train"],
        ("pipeline",): ["--from", "--dry_run", "--output_dir"],
        ("trace",): ["--row", "--recipe", "--json"],
    }
    for recipe in recipes:
        flags = [f"--{name}" for name in settings_of(settings_class(recipe))]
        found["train", recipe] = flags
        found["trace",] += [flag for flag in flags if flag not in found["trace",]]
    for command in commands:
        module = importlib.import_module(f"kitae.cli.{command}")
        settings, verbs = getattr(module, "Settings", None), getattr(module, "VERBS", ())
        if settings is not None:
            flags = [f"--{name}" for name in settings_of(settings)]
            found |= {(command, verb): flags for verb in verbs} | {(command,): list(verbs) or flags}
    return found


def _bash(*, is_zsh: bool) -> str:
    cases = [
        f"    {shlex.quote(' '.join(path) + ' ')}*) words={shlex.quote(' '.join(follow))} ;;"
        for path, follow in sorted(words().items(), key=lambda item: -len(item[0]))
        if path
    ]
    lines = [
        "autoload -U +X bashcompinit && bashcompinit" if is_zsh else "",
        "_kitae() {",
        '  local words before="${COMP_WORDS[*]:1:COMP_CWORD-1} "',
        '  before="${before#launch --nproc*[= ][0-9]* }"',  # what is launched is a command line of its own
        '  case "$before" in',
        *cases,
        f"    *) words={shlex.quote(' '.join(words()[()]))} ;;",
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))',
        "}",
        "complete -o default -F _kitae kitae",
    ]
    return "\n".join(line for line in lines if line)


def _fish() -> str:
    lines = []
    for path, follow in words().items():
        condition = f"__fish_seen_subcommand_from {path[-1]}" if path else "__fish_use_subcommand"
        lines.append(f"complete -c kitae -n '{condition}' -a {shlex.quote(' '.join(follow))}")
    return "\n".join(lines)
