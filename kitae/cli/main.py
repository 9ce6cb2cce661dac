"""`kitae COMMAND ...`: finds the command's file, and turns what it raises into one line and an exit code.

A command is a file of this folder with `main(argv) -> int`. Its docstring's first line is its line in the help.
"""

from __future__ import annotations

import ast
import errno
import importlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import kitae
from kitae.errors import ConfigError, KitaeError
from kitae.plugins import did_you_mean, names_in

UNEXPECTED, USER, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
_USER_ERRNOS = (
    errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `--debug` anywhere shows tracebacks."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_debugging = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _write_any_text()
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("kitae: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`); keep the interpreter from failing on the same pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KitaeError as error:
        return _say(error, _joined(str(error)), code=error.exit_code, is_debugging=is_debugging)
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            return _unexpected(error, is_debugging=is_debugging)
        where = "" if error.filename is None else f": {error.filename}"
        return _say(error, f"{error.strerror}{where}", code=USER, is_debugging=is_debugging)
    except Exception as error:
        return _unexpected(error, is_debugging=is_debugging)


def commands() -> dict[str, str]:
    """Each command with the first line of its file's docstring; nothing is imported."""
    folder = Path(__file__).parent
    found = {}
    for name in names_in("kitae.cli"):
        if name != "main":
            text = (folder / f"{name}.py").read_text(encoding="utf-8")
            found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"kitae {kitae.__version__}")
        return 0
    name = words[0]
    known = [n for n in names_in("kitae.cli") if n != "main"]
    if name not in known:
        raise ConfigError(f"there is no command {name!r}; {did_you_mean(name, known)}")
    code: int = importlib.import_module(f"kitae.cli.{name}").main(words[1:])
    return code


def _write_any_text() -> None:
    """Where the terminal's encoding lacks a character that a model says, `?` stands for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _help() -> str:
    listed = commands()
    width = max(map(len, listed))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in listed.items()]
    return "\n".join(
        [
            (kitae.__doc__ or "").partition("\n")[0],
            "",
            "usage: kitae COMMAND ...    kitae COMMAND --help    kitae --version",
            "",
            *lines,
            "",
            "--debug shows the traceback of an error.",
        ]
    )


def _joined(message: str) -> str:
    """A message with a list in it: a line for each on a terminal, one line anywhere else."""
    head, *rest = [" ".join(line.split()) for line in message.splitlines()] or [""]
    return "\n  ".join([head, *rest]) if sys.stderr.isatty() else f"{head} {'; '.join(rest)}".rstrip()


def _say(error: BaseException, message: str, *, code: int, is_debugging: bool) -> int:
    if is_debugging:
        traceback.print_exception(error)
    print(f"kitae: error: {message}", file=sys.stderr)
    return code


def _unexpected(error: Exception, *, is_debugging: bool) -> int:
    summary = f"{type(error).__name__}: {' '.join(str(error).split())}"
    where = "shown above"
    if not is_debugging:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kitae-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            traceback.print_exception(error, file=file)
        where = f"in {file.name}"
    message = f"unexpected {summary} (a bug in kitae; the traceback is {where})"
    return _say(error, message, code=UNEXPECTED, is_debugging=is_debugging)


if __name__ == "__main__":
    sys.exit(main())
