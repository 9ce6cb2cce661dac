"""vLLM, SGLang and llama.cpp's server in kitae's place: their command, with the model's own template, token and adapters.

    settings --command()--> argv, environment, files --run()--> child --/health--> ready --until it or we are told to end

The token never stands on a command line, which every user of the machine can read.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kitae.errors import ConfigError, EndpointError, MissingExtraError
from kitae.serve.access import write_private

PROGRAMS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llama-server"}
INSTALL = {
    "vllm": "pip install vllm",
    "sglang": "pip install 'sglang[all]'",
    "llama.cpp": "brew install llama.cpp, or build https://github.com/ggml-org/llama.cpp, and put llama-server on the PATH",
}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank."""
POLL_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be served, in words that do not depend on the engine."""

    model: str
    """Folder or hub id of the base, or a .gguf file."""
    name: str
    adapters: Mapping[str, Path]
    host: str
    port: int
    key: str
    max_rows: int
    folder: Path
    """Where files for the engine are written."""
    template: str | None = None
    """The chat template's text, where it is to be handed over."""
    devices: int = 1
    split_thinking: bool = False
    is_moe: bool = False
    dtype: str = "auto"
    context: int | None = None
    threads: int | None = None
    n_gpu_layers: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    trust_remote_code: bool = False
    extra: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Command:
    """How an engine is started."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    models: list[str]
    """Names under which requests find them."""

    def shown(self) -> str:
        """As one would type it."""
        return shlex.join(self.argv)


def command(engine: str, wanted: Wanted) -> Command:
    """The engine's command, and the files it needs, written."""
    program = shutil.which(PROGRAMS[engine])
    if program is None:
        raise MissingExtraError(
            f"--engine {engine} needs {PROGRAMS[engine]}, which is not on the PATH; {INSTALL[engine]}"
        )
    build = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp}[engine]
    return build(program, wanted)


def template_with_system(text: str, system_prompt: str | None) -> str:
    """A chat template that puts this system turn before conversations without one, as kitae does itself."""
    if not system_prompt:
        return text
    literal = json.dumps(system_prompt, ensure_ascii=False)  # Jinja makes no one character of two \ud escapes
    turn = f"[{{'role': 'system', 'content': {literal}}}]"
    return f"{{%- if messages[0]['role'] != 'system' %}}{{%- set messages = {turn} + messages %}}{{%- endif %}}{text}"


def tensor_parallel(devices: int, num_heads: int) -> int:
    """The most devices that a model with this many heads can be spread over evenly."""
    return max(count for count in range(1, devices + 1) if num_heads % count == 0)


def _vllm(program: str, wanted: Wanted) -> Command:
    argv = [program, "serve", wanted.model, "--host", wanted.host, "--port", str(wanted.port)]
    argv += ["--served-model-name", wanted.name, "--tensor-parallel-size", str(wanted.devices)]
    if wanted.is_moe and wanted.devices > 1:
        argv.append("--enable-expert-parallel")
    if wanted.template is not None:
        argv += ["--chat-template", str(_template_file(wanted, wanted.template))]
    if wanted.adapters:
        rank = _largest_rank(wanted.adapters)
        room = next((r for r in VLLM_RANKS if r >= rank), None)
        if room is None:
            raise ConfigError(f"an adapter has rank {rank}; vllm takes at most {VLLM_RANKS[-1]}")
        argv += [
            "--enable-lora",
            "--max-loras",
            str(len(wanted.adapters)),
            "--max-lora-rank",
            str(room),
            "--lora-modules",
        ]
        argv += [f"{name}={path}" for name, path in wanted.adapters.items()]
    if wanted.split_thinking:
        argv += ["--reasoning-parser", "deepseek_r1"]
    argv += _given({"--max-num-seqs": wanted.max_rows, "--max-model-len": wanted.context})
    argv += [] if wanted.dtype == "auto" else ["--dtype", wanted.dtype]
    argv += ["--trust-remote-code"] if wanted.trust_remote_code else []
    return Command(
        argv=[*argv, *wanted.extra],
        environment={"VLLM_API_KEY": wanted.key},
        models=[wanted.name, *wanted.adapters],
    )


def _sglang(program: str, wanted: Wanted) -> Command:
    config = wanted.folder / f"{wanted.port}.sglang.yaml"
    write_private(config, f"api-key: {json.dumps(wanted.key)}\n")  # JSON strings are YAML strings
    argv = [program, "serve", "--config", str(config), "--model-path", wanted.model]
    argv += ["--host", wanted.host, "--port", str(wanted.port), "--served-model-name", wanted.name]
    argv += ["--tp", str(wanted.devices)]
    if wanted.is_moe and wanted.devices > 1:
        argv += ["--ep", str(wanted.devices)]
    if wanted.template is not None:
        argv += ["--chat-template", str(_template_file(wanted, wanted.template))]
    if wanted.adapters:
        argv += ["--enable-lora", "--max-loras-per-batch", str(len(wanted.adapters) + 1)]
        argv += ["--lora-paths", *(f"{name}={path}" for name, path in wanted.adapters.items())]
    if wanted.split_thinking:
        argv += ["--reasoning-parser", "deepseek-r1"]
    argv += _given({"--max-running-requests": wanted.max_rows, "--context-length": wanted.context})
    argv += [] if wanted.dtype == "auto" else ["--dtype", wanted.dtype]
    argv += ["--trust-remote-code"] if wanted.trust_remote_code else []
    adapters = [f"{wanted.name}:{name}" for name in wanted.adapters]
    return Command(argv=[*argv, *wanted.extra], models=[wanted.name, *adapters])


def _llama_cpp(program: str, wanted: Wanted) -> Command:
    if not wanted.model.endswith(".gguf"):
        raise ConfigError(
            f"--engine llama.cpp serves .gguf files, not {wanted.model}; write one with kitae export gguf and serve that"
        )
    if not Path(wanted.model).is_file():
        raise ConfigError(f"no such file: {wanted.model}")
    if len(wanted.adapters) > 1:
        raise ConfigError(
            "llama.cpp does not choose adapters by name; serve one adapter, or start a server for each"
        )
    key_file = wanted.folder / f"{wanted.port}.key"
    write_private(key_file, wanted.key + "\n")
    name = next(iter(wanted.adapters), wanted.name)
    argv = [
        program,
        "--model",
        wanted.model,
        "--host",
        wanted.host,
        "--port",
        str(wanted.port),
        "--alias",
        name,
    ]
    argv += ["--api-key-file", str(key_file), "--jinja", "--no-webui", "--metrics"]
    argv += ["--reasoning-format", "deepseek" if wanted.split_thinking else "none"]
    argv += ["--parallel", str(wanted.max_rows), "--kv-unified"]  # all of them share one context
    for adapter in wanted.adapters.values():
        if adapter.suffix != ".gguf":
            raise ConfigError(
                f"llama.cpp takes adapters as .gguf files, not {adapter}; write one with kitae export gguf"
            )
        argv += ["--lora", str(adapter)]
    if wanted.template is not None:
        argv += ["--chat-template-file", str(_template_file(wanted, wanted.template))]
    argv += _given(
        {
            "--ctx-size": wanted.context,
            "--threads": wanted.threads,
            "--n-gpu-layers": wanted.n_gpu_layers,
            "--cache-type-k": wanted.cache_type_k,
            "--cache-type-v": wanted.cache_type_v,
        }
    )
    return Command(argv=[*argv, *wanted.extra], models=[name])


def _given(flags: Mapping[str, Any]) -> list[str]:
    return [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]


def _template_file(wanted: Wanted, text: str) -> Path:
    path = wanted.folder / f"{wanted.port}.jinja"
    write_private(path, text)
    return path


def _largest_rank(adapters: Mapping[str, Path]) -> int:
    ranks = []
    for name, folder in adapters.items():
        try:
            ranks.append(int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--adapter {name}: {folder} is no adapter folder ({error})") from error
    return max(ranks)


def run(command: Command, *, url: str, grace_s: float, on_ready: Callable[[], None]) -> int:
    """Start the engine, wait until it answers, and stay until it ends; told to end, tell it, and leave with 0."""
    print(command.shown(), file=sys.stderr, flush=True)
    child = subprocess.Popen(
        command.argv, env={**os.environ, **command.environment}, stdin=subprocess.DEVNULL
    )
    is_asked = False

    def end(_number: int, _frame: object) -> None:
        nonlocal is_asked
        is_asked = True
        child.terminate()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while child.poll() is None and not answers(url):
            time.sleep(POLL_S)
        if child.poll() is None:
            on_ready()
            _wait(child, lambda: is_asked, grace_s)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if is_asked:
        return 0
    raise EndpointError(
        f"{Path(command.argv[0]).name} ended by itself with exit code {child.returncode}; see its lines above"
    )


def _wait(child: subprocess.Popen[bytes], is_asked: Callable[[], bool], grace_s: float) -> None:
    """Until it ends; asked to, it has `grace_s` for that."""
    deadline = None
    while child.poll() is None:
        if is_asked() and deadline is None:
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(POLL_S)


def answers(url: str) -> bool:
    """Whether the server says that it is healthy; that needs no token, and no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False
