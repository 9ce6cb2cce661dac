"""Serve a model over OpenAI's API: kitae serve MODEL [--adapter NAME=PATH ...] [--engine vllm|sglang|llama.cpp]."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import UseSettings, open_model, warn_on_stderr
from kitae.config import home, require
from kitae.errors import MissingExtraError
from kitae.settings import read

if TYPE_CHECKING:
    import socket

    from kitae.rollout.choose import LocalEngine

log = logging.getLogger(__name__)
EXTERNAL = ("vllm", "sglang", "llama.cpp")


class Settings(UseSettings):
    """Serve a model over OpenAI's API. The sampling settings are what a request gets that does not say."""

    adapter: list[str] = Field(default_factory=list)
    """LoRA adapters on the model as NAME=PATH; requests choose one by its name. They share the model's weights in memory."""
    served_model_name: str | None = None
    """What requests call the model; default: the last part of its path."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than 127.0.0.1 lets other machines in, unencrypted, who need the token."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """The token that requests must carry. Others on this machine can read a command line; api_key_file is safer."""
    api_key_file: str | None = None
    """File with the token, readable by its owner only; default: a new token, in a file under ~/.kitae/serve."""
    ready_file: str | None = None
    """Where URL and models are written as JSON once the server answers; default: under ~/.kitae/serve."""
    max_new_tokens: int = Field(32768, ge=1)
    """Most tokens of an answer, and what a chat gets that does not say; less where the model's context ends."""
    max_queue: int = Field(128, ge=0)
    """Completions that may wait while batch_size of them run; beyond that requests are answered 429. More wait longer."""
    max_request_mib: float = Field(8.0, gt=0, le=1024)
    """Largest request body; a larger one is answered 413."""
    grace_s: float = Field(15.0, ge=1)
    """Answers under way may take this long to finish when the server is told to end."""
    reasoning_format: Literal["inline", "split"] = "inline"
    """inline leaves the thinking in the content between <think> tags; split puts it into reasoning_content."""
    engine: Literal["auto", "generic", "native", "paged", "vllm", "sglang", "llama.cpp"] = "auto"  # type: ignore[assignment]
    """auto, generic, native and paged are kitae's own, as in kitae generate; others are started instead, if installed."""
    threads: int | None = Field(None, ge=1)
    """CPU threads that compute; default: all cores."""
    n_gpu_layers: int | None = Field(None, ge=0)
    """llama.cpp only: layers kept on the GPU; more need more of its memory."""
    cache_type_k: str | None = None
    """llama.cpp only: how keys are stored, such as q8_0; fewer bits hold longer contexts."""
    cache_type_v: str | None = None
    """llama.cpp only: how values are stored, such as q8_0."""
    max_model_len: int | None = Field(None, ge=1)
    """vllm, sglang and llama.cpp: context in tokens; more need more memory. Default: the engine's own."""
    engine_args: list[str] = Field(default_factory=list)
    """Further words for vllm, sglang or llama.cpp, passed on as they are, such as --engine_args=--seed=1."""


def main(argv: list[str]) -> int:
    """Serve until told to end."""
    if _help.is_asked(argv):
        _help.show(Settings, prog="kitae serve MODEL")
        return 0
    use, notes = read("serve", Settings, argv, positional=("model",))
    warn_on_stderr(notes.warnings)
    adapters = _adapters(use)
    name = use.served_model_name or name_of(use.model)
    if use.engine in EXTERNAL:
        return _serve_external(use, name, adapters)
    require(
        not (use.model.endswith(".gguf") and Path(use.model).expanduser().is_file()),
        f"{use.model} is a GGUF file, which llama.cpp runs: say --engine llama.cpp, or name the folder it was made of",
    )
    for setting in ("n_gpu_layers", "cache_type_k", "cache_type_v", "max_model_len", "engine_args"):
        require(
            not getattr(use, setting), f"--{setting} has no effect with --engine {use.engine}; leave it out"
        )
    for setting in ("raw", "seed"):
        require(
            not getattr(use, setting), f"--{setting} has no effect in a server: requests say it; leave it out"
        )
    return _serve(use, name, adapters)


def name_of(model: str) -> str:
    """The last part of a path, also of the folder that `.` or `..` is."""
    name = Path(model.rstrip("/")).name
    return (name if name.strip(".") else Path(model).resolve().name).removesuffix(".gguf")


def _adapters(use: Settings) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in use.adapter:
        name, equals, path = text.partition("=")
        require(bool(name and equals and path), f"--adapter is {text!r}; write NAME=PATH")
        require(name not in found, f"--adapter names {name!r} twice")
        found[name] = Path(path).expanduser()
    return found


def _serve(use: Settings, name: str, adapters: dict[str, Path]) -> int:
    from kitae.serve import address

    try:
        from kitae.serve import http  # noqa: F401  # before anything is loaded
        from kitae.serve import metrics as _metrics  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"kitae serve needs {error.name}; run: pip install 'kitae[serve]'") from error
    listener = address.bind(use.host, use.port)  # first of all: nobody wants to hear it after a long load
    if use.host not in ("127.0.0.1", "localhost", "::1"):
        log.warning(
            "listening on %s: traffic is not encrypted; put a proxy with TLS before it on open networks",
            use.host,
        )
    port: int = listener.getsockname()[1]
    with listener:
        key, key_file = _key(use, port)
        try:
            return _run(use, name, adapters, listener, key=key, key_file=key_file)
        finally:
            _forget(use, port)


def _run(
    use: Settings,
    name: str,
    adapters: dict[str, Path],
    listener: socket.socket,
    *,
    key: str,
    key_file: Path | None,
) -> int:
    import asyncio

    import torch

    from kitae.models import files
    from kitae.rollout.choose import open_engine
    from kitae.serve import address, http
    from kitae.serve.access import Gate
    from kitae.serve.app import Limits, Service, make_app
    from kitae.serve.engine import EngineThread
    from kitae.serve.lanes import make_lanes

    if use.threads is not None:
        torch.set_num_threads(use.threads)
    if adapters:
        base = files.find_model(use.model, revision=use.revision, with_code=use.trust_remote_code).folder
        for path in adapters.values():
            files.require_same_family(path, base)
    opened = open_model(use, must_chat=False)
    if not opened.template.can_chat:
        log.warning("%s has no chat template: it answers /v1/completions only; --template gives it one", name)

    def generic() -> LocalEngine:
        return open_engine(
            opened.policy,
            wanted="generic",
            setting="engine",
            expected_tokens=0,
            stop_ids=opened.template.stop_ids,
            decode=opened.template.decode,
            max_rows=use.batch_size,
        ).engine

    engine = EngineThread(
        make_lanes(opened.policy, opened.engine, name=name, adapters=adapters, generic=generic)
    )
    config = opened.policy.causal_lm.config.get_text_config()
    limits = Limits(
        context=min(opened.context or 1 << 20, engine.most_tokens),
        vocabulary=config.vocab_size,
        max_new_tokens=use.max_new_tokens,
        max_rows=use.batch_size,
        max_queue=use.max_queue,
        max_request_bytes=int(use.max_request_mib * 2**20),
    )
    service = Service(
        engine,
        template=opened.template,
        defaults=use.sampling(),
        limits=limits,
        reasoning_format=use.reasoning_format,
        aliases=[use.model],
    )
    facts = {
        "url": address.url_of(listener),
        "models": list(engine.lanes),
        "api_key_file": str(key_file or ""),
    }
    port: int = listener.getsockname()[1]
    server = http.make_server(
        make_app(service, gate=Gate(key)),
        grace_s=use.grace_s,
        on_ready=lambda: _say_ready(use, port, facts),
        on_end=service.drain,
    )
    engine.start()
    asyncio.run(server.serve(sockets=[listener]))
    engine.close()
    return 0


def _serve_external(use: Settings, name: str, adapters: dict[str, Path]) -> int:
    from kitae.cli import _external
    from kitae.serve import address, external

    _external.check(use)
    with address.bind(use.host, use.port) as listener:  # is it free? the engine binds it itself
        port: int = listener.getsockname()[1]
        url = address.url_of(listener)
    key, key_file = _key(use, port)
    folder = _state_folder()
    try:
        wanted = _external.wanted(use, name=name, adapters=adapters, port=port, key=key, folder=folder)
        command = external.command(use.engine, wanted)
        facts = {"url": url, "models": command.models, "api_key_file": str(key_file or "")}
        return external.run(
            command, url=url, grace_s=use.grace_s, on_ready=lambda: _say_ready(use, port, facts)
        )
    finally:
        _forget(use, port)
        for suffix in ("jinja", "key", "sglang.yaml"):
            (folder / f"{port}.{suffix}").unlink(missing_ok=True)


def _state_folder() -> Path:
    return home() / "serve"


def _key(use: Settings, port: int) -> tuple[str, Path | None]:
    """The token, and the file it is in."""
    from kitae.serve.access import checked, new_key, read_key, write_private

    require(not (use.api_key and use.api_key_file), "api_key and api_key_file are both set; leave one out")
    if use.api_key is not None:
        return checked(use.api_key, where="--api_key"), None
    if use.api_key_file is not None:
        path = Path(use.api_key_file).expanduser()
        return read_key(path), path
    path = _state_folder() / f"{port}.token"
    key = new_key()
    write_private(path, key + "\n")
    return key, path


def _ready_file(use: Settings, port: int) -> Path:
    default = _state_folder() / f"{port}.json"
    return Path(use.ready_file).expanduser() if use.ready_file else default


def _say_ready(use: Settings, port: int, facts: Mapping[str, object]) -> None:
    """One line of JSON for programs, and a line for people."""
    from kitae.serve.access import write_private

    line = json.dumps({"status": "ready", "pid": os.getpid(), **facts}, ensure_ascii=False)
    write_private(_ready_file(use, port), line + "\n")
    print(line, flush=True)
    if sys.stderr.isatty():
        where = f" --token_file {facts['api_key_file']}" if facts["api_key_file"] else " --token ..."
        print(f"talk to it: kitae chat --endpoint {facts['url']}{where}", file=sys.stderr)


def _forget(use: Settings, port: int) -> None:
    """Take away what said that the server is there."""
    _ready_file(use, port).unlink(missing_ok=True)
    if use.api_key is None and use.api_key_file is None:
        (_state_folder() / f"{port}.token").unlink(missing_ok=True)
