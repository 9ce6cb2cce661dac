"""How a model answers, whatever runs it: log-probabilities of what may come next, greedy completions, where it stops.

A folder runs in kitae; a GGUF file in llama.cpp (verify_llama.py), or dequantised in kitae where that is not installed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kitae.config import ModelSettings, SamplingSettings
from kitae.data.chat import Template
from kitae.data.collate import collate
from kitae.errors import PlanError
from kitae.export.gguf_read import Opened, write_back
from kitae.export.gguf_vocab import load_template
from kitae.export.source import Source
from kitae.models.load import load_policy, load_tokenizer
from kitae.models.policy import Policy
from kitae.rollout.choose import open_engine
from kitae.types import Problem, Row

TOP = 256
"""The reference's likeliest tokens, over which distributions are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt."""

    messages: list[dict[str, str]]
    """Empty where the model has no chat template."""
    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one model said to all questions."""

    how: str
    """What ran it."""
    logprobs_QPV: list[Tensor]
    """Of each question, at the positions that are compared; -inf where only the likeliest were told."""
    greedy: list[list[int]]
    texts: list[str]
    stop_ids: list[int]
    """Ids that end its completions."""
    template: str | None
    """Fingerprint of its chat template, with system prompt and stop ids."""
    differences: list[str]
    """How it reads or renders text otherwise than the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """What every model is asked: questions, and the completions after whose tokens all are compared."""

    questions: list[Question]
    forced: list[list[int]]
    max_new_tokens: int


def pose(tokenizer: Any, template: Template | None, prompts: Sequence[str]) -> list[Question]:
    """The prompts as the model is asked them."""
    if template is None:
        return [Question(messages=[], text=text, ids=tokenizer.encode(text)) for text in prompts]
    found = []
    for text in prompts:
        messages = [{"role": "user", "content": text}]
        ids, _ = template.prompt(messages)
        found.append(Question(messages=messages, text=tokenizer.decode(ids), ids=ids))
    return found


@contextlib.contextmanager
def loaded(folder: Path, *, base: Path | None = None) -> Iterator[tuple[Policy, str]]:
    """A model in float32, or in bfloat16 where only that fits; `base` takes the place of the one an adapter names."""
    gc.collect()  # the model before may still be in memory, held by a cycle
    with contextlib.ExitStack() as stack:
        if base is not None:
            folder = stack.enter_context(_on_base(folder, base))
        settings: dict[str, Any] = {"name_or_path": str(folder), "device": "cpu"}
        try:
            yield load_policy(ModelSettings(**settings, dtype="float32"), trainable=False), "kitae, float32"
        except PlanError:
            yield load_policy(ModelSettings(**settings, dtype="bfloat16"), trainable=False), "kitae, bfloat16"


@contextlib.contextmanager
def _on_base(adapter: Path, base: Path) -> Iterator[Path]:
    with TemporaryDirectory(prefix="kitae-verify-") as name:
        folder = Path(name)
        for path in adapter.iterdir():
            if path.is_file() and path.name != "adapter_config.json":
                (folder / path.name).symlink_to(path.resolve())
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(base.resolve())
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a folder, a transformers PreTrainedTokenizerFast."""
    return load_tokenizer(ModelSettings(name_or_path=str(folder), tokenizer=str(folder)))


def complete(
    policy: Policy,
    questions: Sequence[Question],
    *,
    tokenizer: Any,
    template: Template | None,
    max_new_tokens: int,
) -> tuple[list[list[int]], list[str]]:
    """Greedy completions, as ids and text."""
    engine, _ = open_engine(
        policy,
        wanted="generic",
        setting="engine",
        expected_tokens=len(questions) * max_new_tokens,
        stop_ids=stop_ids_of(tokenizer, template),
        decode=tokenizer.decode if template is None else template.decode,
        max_rows=len(questions),
    )
    problems = [Problem(prompt=q.text, token_ids=q.ids, index=i) for i, q in enumerate(questions)]
    sampling = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0)
    groups = engine.generate(problems, n=1, sampling=sampling, seed=0)
    return [list(group[0].token_ids) for group in groups], [group[0].text for group in groups]


@torch.no_grad()
def distributions(policy: Policy, exam: Exam) -> list[Tensor]:
    """Log-probabilities of every token at each position of the forced completions."""
    policy.eval()
    found = []
    for question, forced in zip(exam.questions, exam.forced, strict=True):
        mask = [False] * len(question.ids) + [True] * len(forced)
        row = Row(token_ids=question.ids + forced, loss_mask=mask, prompt_length=len(question.ids))
        (batch,) = collate([row], rows_per_forward=1)
        found.append(policy.logits(policy.predicting(batch)).log_softmax(-1))
    return found


def answers_of_folder(folder: Path, exam: Exam, *, reference: Any) -> Answers:
    """What a model folder says; `reference` is the tokenizer its texts are compared with."""
    tokenizer = tokenizer_of(folder)
    template = load_template(tokenizer)
    with loaded(folder) as (policy, how):
        greedy, texts = complete(
            policy,
            exam.questions,
            tokenizer=tokenizer,
            template=template,
            max_new_tokens=exam.max_new_tokens,
        )
        said = distributions(policy, exam)
    return Answers(
        how=how,
        logprobs_QPV=said,
        greedy=greedy,
        texts=texts,
        stop_ids=stop_ids_of(tokenizer, template),
        template=None if template is None else template.fingerprint,
        differences=_differences(tokenizer, template, exam, reference),
    )


def sit(
    folder: Path,
    questions: list[Question],
    *,
    base: Path | None,
    tokenizer: Any,
    template: Template | None,
    max_new_tokens: int,
) -> tuple[Exam, Answers]:
    """The exam that the reference's own greedy completions make, and its answers."""
    with loaded(folder, base=base) as (policy, how):
        greedy, texts = complete(
            policy, questions, tokenizer=tokenizer, template=template, max_new_tokens=max_new_tokens
        )
        exam = Exam(questions=questions, forced=greedy, max_new_tokens=max_new_tokens)
        said = distributions(policy, exam)
    return exam, Answers(
        how=how,
        logprobs_QPV=said,
        greedy=greedy,
        texts=texts,
        stop_ids=stop_ids_of(tokenizer, template),
        template=None if template is None else template.fingerprint,
        differences=[],
    )


def stop_ids_of(tokenizer: Any, template: Template | None) -> list[int]:
    """Ids that end a completion."""
    if template is not None:
        return list(template.stop_ids)
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _differences(tokenizer: Any, template: Template | None, exam: Exam, reference: Any) -> list[str]:
    posed = pose(
        tokenizer, template, [q.messages[-1]["content"] if q.messages else q.text for q in exam.questions]
    )
    unlike = sum(a.ids != b.ids for a, b in zip(posed, exam.questions, strict=True))
    found = [f"{unlike} of {len(posed)} prompts become other token ids"] if unlike else []
    if tokenizer.get_vocab() != reference.get_vocab():
        found.append("the vocabulary is another one")
    return found


def answers_of_dequantised(
    opened: Opened, source: Source, exam: Exam, *, reference: Any, template: str | None
) -> Answers:
    """What the file's weights say in kitae's own modules."""
    with TemporaryDirectory(prefix="kitae-verify-") as name:
        folder = Path(name)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for path in source.folder.iterdir():
            if path.is_file() and path.name.startswith(
                ("tokenizer", "special_tokens", "chat_template", "kitae_t")
            ):
                shutil.copy(path, folder / path.name)
        write_back(opened, source, folder)
        said = answers_of_folder(folder, exam, reference=reference)
    eos = opened.metadata.get("tokenizer.ggml.eos_token_id")
    ends = [opened.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eot", "eom")]
    return Answers(
        how="dequantised by gguf, " + said.how,
        logprobs_QPV=said.logprobs_QPV,
        greedy=said.greedy,
        texts=said.texts,
        stop_ids=sorted({number for number in (eos, *ends) if number is not None}),
        template=template,
        differences=[],
    )
