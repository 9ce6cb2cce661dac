"""Chat templates are programs from strangers: they run in jinja2's immutable sandbox, after a trial in a cage.

The sandbox stops a template from reaching files or code, but not from looping or filling memory. So each template is
rendered once in a separate process with hard limits before it is used here. Run as a program, this file is that
process; it imports nothing but jinja2, to start fast.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_OUTPUT_CHARACTERS = 1024 * 1024
FIXED_DATE = datetime(2024, 7, 26)
"""What templates get that write today's date: a run resumed tomorrow must see the same tokens."""
CPU_SECONDS = 2
MEMORY_BYTES = 512 * 1024 * 1024
TRIAL = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "<think>A greeting.</think>Hi."},
    {"role": "user", "content": "Bye"},
]


class _GenerationBlock(Extension):
    """`{% generation %}` marks assistant text for other tools; here its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is jinja2's

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(text: str) -> jinja2.Template:
    """The template in the environment that transformers gives chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment.from_string(text)


@lru_cache(maxsize=64)
def why_unsafe(text: str) -> str | None:
    """Render the template in a process of 2 CPU seconds and 512 MiB; None if that went well, else what went wrong.

    An error that the template itself reports, such as a role it does not know, is not what this looks for.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
        return f"is larger than {MAX_TEMPLATE_BYTES // 1024} KiB"
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps(text).encode(),
            capture_output=True,
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "did not finish within 30 s"
    if done.returncode == 0:
        return None
    if done.returncode == 1:
        return done.stderr.decode(errors="replace").strip() or "failed"
    return f"needs more than {CPU_SECONDS} s or {MEMORY_BYTES // 1024**2} MiB to render four short turns"


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without the HTML escapes of jinja2's own filter, as chat templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _trial() -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        template = compile_template(json.load(sys.stdin))
        text = template.render(messages=TRIAL, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    except jinja2.exceptions.SecurityError as error:
        return _refuse(f"reaches for something it must not: {error}")
    except jinja2.exceptions.TemplateSyntaxError as error:
        return _refuse(f"has a syntax error in line {error.lineno}: {error.message}")
    except (MemoryError, RecursionError) as error:
        return _refuse(f"uses too much memory ({type(error).__name__})")
    except Exception:  # the template's own complaint about these turns is met again, and reported, at its use
        return 0
    return _refuse("writes more than 1 MiB for four short turns") if len(text) > MAX_OUTPUT_CHARACTERS else 0


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(_trial())
