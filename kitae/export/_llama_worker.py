"""llama.cpp in a process of its own, which may die of a damaged file: python -m kitae.export._llama_worker JOB RESULT.

Reads a job as JSON, runs llama.cpp's server (xllamacpp) on a loopback port with a key of its own, and writes what it
said as JSON: log-probabilities after given tokens, greedy completions, token ids of texts, rendered conversations, and
which ids end a completion. It prints a line for each answer of the server, by which a hang is told from slow work.
"""

from __future__ import annotations

import json
import secrets
import sys
import urllib.request
from pathlib import Path
from typing import Any

FORCED_BIAS = 1e6
"""Added to a token's logit, so that it is said."""


class _Server:
    """The server of one model."""

    def __init__(self, job: dict[str, Any]) -> None:
        import xllamacpp  # type: ignore[import-untyped]

        params = xllamacpp.CommonParams()
        params.model.path = job["path"]
        params.n_ctx = job["context"]
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.fit_params = False
        params.verbosity = 2
        params.cpuparams.n_threads = job["threads"]
        params.cpuparams_batch.n_threads = job["threads"]
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if job.get("lora"):
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["lora"], 1.0)]
        self._key = secrets.token_hex(16)
        params.api_keys = [self._key]
        self._server = xllamacpp.Server(params)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as answer:
            found: dict[str, Any] = json.load(answer)
        print("answered", path, flush=True)
        return found

    def complete(self, ids: list[int], *, tokens: int, **more: Any) -> dict[str, Any]:
        body = {
            "prompt": ids, "n_predict": tokens, "temperature": 0.0, "cache_prompt": True, "return_tokens": True,
        }  # fmt: skip
        return self.ask("/completion", {**body, **more})

    def tokens(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of a text; `add_special` puts a BOS before it where the file says so, as the server does itself."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        found: list[int] = self.ask("/tokenize", body)["tokens"]
        return found

    def likeliest(self, ids: list[int], *, count: int) -> list[dict[str, Any]]:
        """The likeliest next tokens, each an `id` with its `logprob` as the model gives it, whatever is said then."""
        said = self.complete(ids, tokens=1, n_probs=count)
        # Nothing is told of a token that is but part of a character.
        if "completion_probabilities" not in said:
            letter = self.ask("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
            said = self.complete(ids, tokens=1, n_probs=count, logit_bias=[[letter, FORCED_BIAS]])
        found: list[dict[str, Any]] = said["completion_probabilities"][0]["top_logprobs"]
        return found


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Everything the job asks for."""
    server = _Server(job)
    positions = []
    for prompt, forced in job["sequences"]:
        row = []
        for i in range(len(forced)):
            top = server.likeliest(prompt + forced[:i], count=job["top"])
            row.append([[entry["id"] for entry in top], [entry["logprob"] for entry in top]])
        positions.append(row)
    greedy = []
    for prompt, _ in job["sequences"]:
        said = server.complete(prompt, tokens=job["max_tokens"], top_k=1)
        greedy.append({"ids": said["tokens"], "text": said["content"], "stop": said["stop_type"]})
    stops = {}
    for number in job["stop_ids"]:
        said = server.complete(job["sequences"][0][0], tokens=4, top_k=1, logit_bias=[[number, FORCED_BIAS]])
        stops[str(number)] = said["stop_type"] == "eos" and said["tokens_predicted"] == 1
    rendered = [
        server.ask("/apply-template", {"messages": messages})["prompt"] for messages in job["conversations"]
    ]
    return {
        "positions": positions,
        "greedy": greedy,
        "stops": stops,
        "tokens": [server.tokens(text, add_special=job["add_special"]) for text in job["texts"]],
        "rendered": rendered,
        "rendered_tokens": [server.tokens(text, add_special=True) for text in rendered],
    }


if __name__ == "__main__":
    result = answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
