"""The gate: an export is compared with what it was made of, and refused where it says something else.

reference --greedy answers--> exam --> every candidate: tensors, distributions, greedy text, stops, template --> table

Where a model cannot be run here, its tensors are compared all the same, and the table says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae.errors import KitaeError, ModelError
from kitae.export.convert import How
from kitae.export.folders import REPORT
from kitae.export.gguf_file import require_gguf
from kitae.export.gguf_lora import check_lora
from kitae.export.gguf_metadata import model_metadata
from kitae.export.gguf_read import Opened, open_gguf
from kitae.export.gguf_tensors import architecture
from kitae.export.gguf_vocab import load_template, tokenizer_metadata
from kitae.export.pretokenizers import EXPRESSIONS, find_pretokenizer, unlike_probes
from kitae.export.source import Source, open_source
from kitae.export.verify_answers import (
    TOP,
    Answers,
    Exam,
    answers_of_dequantised,
    answers_of_folder,
    answers_of_llama_cpp,
    has_llama_cpp,
    sit,
    tokenizer_of,
)
from kitae.export.verify_tensors import Tensors, check_tensors
from kitae.export.weights import Weights, open_weights
from kitae.models.files import read_json
from kitae.train.files import finite, write_json

log = logging.getLogger(__name__)

PROMPTS = (
    "What is 12 + 30?",
    "Name three colours.",
    "Write a function that adds two numbers in Python.",
    "A train leaves at 9:40 and arrives at 11:05. How long does it take? Think step by step.",
    "Translate 'good morning' into French.",
    "Why is the sky blue? Answer in one sentence.",
)
"""What models are asked where nothing else is said."""
MAX_NEW_TOKENS = 16
ALLOWED_KL = {
    "F32": 1e-4, "BF16": 0.01, "F16": 0.01, "F8_E4M3": 0.05, "packed": 0.3, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K": 0.1,
    "Q5_1": 0.1, "Q5_0": 0.1, "Q4_K": 0.3, "Q4_0": 0.3,
}  # fmt: skip
"""Nats, the mean over positions, by the type most matrices have; of a GGUF file by its coarsest."""
ALLOWED_KL_OTHERS = 1.0
GENERATION = "generation_config.json"


@dataclass(slots=True, kw_only=True)
class Checked:
    """One row of the table."""

    name: str
    kind: str
    how: str
    max_logit: float | None = None
    """Largest difference of log-probabilities (logits less their log-sum-exp) among the reference's likeliest tokens."""
    mean_logit: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    same_top: float | None = None
    """Share of positions at which both find the same token likeliest."""
    same_text: float | None = None
    """Share of greedy completions that are the same to the token."""
    stops: list[int] | None = None
    template: str | None = None
    tensors: Tensors | None = None
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__slots__ if name not in ("tensors",)}
        return {**own, "tensors": None if self.tensors is None else self.tensors.as_json()}


def verify(
    reference: str,
    candidates: Sequence[str | Path],
    *,
    base: str | None = None,
    dequantize: bool = False,
    prompts: Sequence[str] = PROMPTS,
    threads: int = 0,
) -> dict[str, Any]:
    """Compare exports with the model or adapter they were made of; `passed` of the report says whether all are fit."""
    source = open_source(reference, base=base, dequantize=dequantize)
    folder = source.adapter or source.weights.folder
    threads = How(output=Path(), num_workers=threads).threads
    rows: list[Checked] = []
    exam, said, why = _sit(source, folder, prompts)
    if exam is not None and said is not None:
        named = "base+adapter" if source.adapter is not None else "base"
        if source.adapter is not None:
            rows.append(_row_of_base(source, exam, said))
        rows.append(
            Checked(
                name=named, kind=_kind_of_weights(source.weights), how=said.how, stops=said.stop_ids, template=said.template
            )
        )  # fmt: skip
    else:
        log.warning("the models are not run, only their tensors are compared: %s", why)
    for candidate in candidates:
        rows.append(_check(Path(candidate).expanduser(), source, exam, said, threads=threads))
    return {
        "command": "verify",
        "reference": str(folder),
        "base": str(source.weights.folder),
        "prompts": list(prompts) if exam is not None else [],
        "positions": sum(map(len, exam.forced)) if exam is not None else 0,
        "not_run": why,
        "rows": [row.as_json() for row in rows],
        "passed": not any(row.failures for row in rows),
    }


def verify_adapter(reference: str, candidate: Path, *, base: str | None = None) -> dict[str, Any]:
    """Compare an adapter's GGUF file with the adapter, tensor by tensor."""
    source = open_source(reference, base=base)
    row = Checked(name=candidate.name, kind="", how="tensors only")
    try:
        opened = open_gguf(candidate)
        row.kind = _kind_of_gguf(opened)
        row.tensors = check_lora(source, candidate)
        row.failures += row.tensors.failures
    except KitaeError as error:
        row.failures.append(str(error))
    return {
        "command": "verify",
        "reference": str(source.adapter),
        "base": str(source.weights.folder),
        "prompts": [],
        "positions": 0,
        "not_run": "the file is an adapter alone",
        "rows": [row.as_json()],
        "passed": not row.failures,
    }


def save(report: dict[str, Any], output: Path) -> Path:
    """Write the report into an exported folder, or beside a file."""
    path = output / REPORT if output.is_dir() else output.with_name(f"{output.name}.verify.json")
    write_json(path, finite(report))
    return path


def _sit(
    source: Source, folder: Path, prompts: Sequence[str]
) -> tuple[Exam | None, Answers | None, str | None]:
    """The exam with the reference's answers, or why it cannot be run."""
    base = source.weights.folder if source.adapter is not None else None
    try:
        exam, said = sit(
            folder,
            prompts,
            base=base,
            tokenizer=tokenizer_of(source.folder),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        return exam, said, None
    except KitaeError as error:
        return None, None, str(error)


def _row_of_base(source: Source, exam: Exam, said: Answers) -> Checked:
    """How far the adapter took the base."""
    found = Checked(name="base", kind=_kind_of_weights(source.weights), how="")
    try:
        answers = answers_of_folder(source.weights.folder, exam, reference=tokenizer_of(source.folder))
    except KitaeError as error:
        found.how = f"not run: {error}"
        return found
    _measure(found, said, answers)
    return found


def _check(
    candidate: Path, source: Source, exam: Exam | None, said: Answers | None, *, threads: int
) -> Checked:
    """One export: its tensors, its metadata, and what it says."""
    if not candidate.exists():
        raise ModelError(f"no such file or folder: {candidate}")
    is_file = candidate.is_file()
    found = Checked(name=candidate.name, kind="", how="tensors only")
    try:
        opened = open_gguf(candidate) if is_file else None
        found.kind = (
            _kind_of_gguf(opened) if opened is not None else _kind_of_weights(open_weights(candidate))
        )
        found.tensors = check_tensors(source, candidate)
        found.failures += found.tensors.failures
        if opened is not None:
            found.failures += _metadata_differences(opened, source)
        else:
            found.failures += _end_differences(candidate, source)
        if exam is not None and said is not None:
            answers = _ask(candidate, opened, source, exam, said, threads=threads)
            _judge(found, said, answers)
    except KitaeError as error:
        found.failures.append(str(error))
    return found


def _ask(
    candidate: Path, opened: Opened | None, source: Source, exam: Exam, said: Answers, *, threads: int
) -> Answers:
    tokenizer = tokenizer_of(source.folder)
    if opened is None:
        return answers_of_folder(candidate, exam, reference=tokenizer)
    if has_llama_cpp():
        return answers_of_llama_cpp(
            candidate,
            exam,
            reference=tokenizer,
            stop_ids=said.stop_ids,
            template=said.template,
            threads=threads,
        )
    return answers_of_dequantised(opened, source, exam, reference=tokenizer, template=said.template)


def _judge(found: Checked, said: Answers, answers: Answers) -> None:
    """Measure, and say what is not as it should be."""
    _measure(found, said, answers)
    limit = ALLOWED_KL.get(found.kind, ALLOWED_KL_OTHERS)
    if found.kl_mean is None or not found.kl_mean <= limit:
        found.failures.append(f"it answers otherwise: a mean KL of {found.kl_mean:.3g} nats, not {limit:.3g}")
    if missing := sorted(set(said.stop_ids) - set(answers.stop_ids)):
        found.failures.append(f"it does not stop at ids {missing}, at which the reference stops")
    if answers.template != said.template:
        found.failures.append("its chat template, system prompt or stop ids are others")
    found.failures += answers.differences


def _measure(found: Checked, said: Answers, answers: Answers) -> None:
    """Fill in how far two models are from each other."""
    found.how, found.stops, found.template = answers.how, answers.stop_ids, answers.template
    differences, kls, tops = [], [], []
    for wanted, is_ in zip(said.logprobs_QPV, answers.logprobs_QPV, strict=True):
        difference, kl, same = compare(wanted, is_)
        differences.append(difference.reshape(-1))
        kls.append(kl)
        tops.append(same)
    found.max_logit = float(torch.cat(differences).abs().max())
    found.mean_logit = float(torch.cat(differences).abs().mean())
    found.kl_mean, found.kl_max = float(torch.cat(kls).mean()), float(torch.cat(kls).max())
    found.same_top = float(torch.cat(tops).float().mean())
    found.same_text = sum(a == b for a, b in zip(said.greedy, answers.greedy, strict=True)) / len(said.greedy)


def compare(wanted_PV: Tensor, found_PV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of log-probabilities [P, K], KL(wanted || found) [P], and whether both find the same token likeliest.

    K are the TOP likeliest tokens of `wanted`; all others are one outcome in the KL, which is then at most the whole one.
    A token that `found` did not tell counts as likely as the least of those it told.
    """
    width = max(wanted_PV.shape[1], found_PV.shape[1])
    floor_P1 = found_PV.masked_fill(found_PV == -torch.inf, torch.inf).amin(1, keepdim=True)
    found_PV = torch.nn.functional.pad(found_PV, (0, width - found_PV.shape[1]), value=-torch.inf)
    found_PV = torch.maximum(found_PV, floor_P1)
    top_PK = wanted_PV.topk(min(TOP, wanted_PV.shape[1]), dim=1)
    p, q = top_PK.values.double(), found_PV.gather(1, top_PK.indices).double()
    kl = (p.exp() * (p - q)).sum(1)
    if wanted_PV.shape[1] > TOP:
        rest_p, rest_q = ((1 - x.exp().sum(1)).clamp_min(1e-12) for x in (p, q))
        kl = kl + rest_p * (rest_p / rest_q).log()
    return (q - p).float(), kl.clamp_min(0).float(), wanted_PV.argmax(1) == found_PV.argmax(1)


# what is stored ---------------------------------------------------------------------------------------------------


def _kind_of_weights(weights: Weights) -> str:
    if weights.packed:
        return "packed"
    if weights.scales:
        return "F8_E4M3"
    kinds = [stored.dtype for stored in weights.tensors.values() if len(stored.shape) > 1]
    return max(set(kinds), key=kinds.count) if kinds else "F32"


def _kind_of_gguf(opened: Opened) -> str:
    """The coarsest type among the tensors."""
    kinds = {opened.kind(name) for name in opened.tensors}
    others = kinds - ALLOWED_KL.keys()
    return sorted(others)[0] if others else max(kinds, key=lambda kind: list(ALLOWED_KL).index(kind))


def _end_differences(folder: Path, source: Source) -> list[str]:
    """Where a folder tells other programs to end completions otherwise than what it was made of."""
    told = source.weights.folder
    if source.adapter is not None and (source.adapter / GENERATION).is_file():
        told = source.adapter
    wanted, found = _ends(told), _ends(folder)
    if not wanted or wanted == found:
        return []
    return [f"{GENERATION} and config.json end completions at ids {sorted(found)}, not {sorted(wanted)}"]


def _ends(folder: Path) -> set[int]:
    """eos_token_id as transformers and engines read it: of generation_config.json, else of config.json."""
    for name in (GENERATION, "config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        ids = content.get("eos_token_id")
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()


def _metadata_differences(opened: Opened, source: Source) -> list[str]:
    """What a file says otherwise than it would if it were written now: tokens, ids, template, sizes."""
    gguf = require_gguf()
    writer = gguf.GGUFWriter(None, architecture(source.config))
    tokenizer = tokenizer_of(source.folder)
    vocab_size = opened.shape("token_embd.weight")[0] if "token_embd.weight" in opened.tensors else 0
    pre = opened.metadata.get("tokenizer.ggml.pre")
    model_metadata(writer, source.config, vocab_size=vocab_size)
    tokenizer_metadata(writer, tokenizer, load_template(tokenizer), size=vocab_size, pre=pre)
    found = []
    for key, value in writer.kv_data[0].items():
        if key not in opened.metadata:
            found.append(f"{key} is missing")
        elif not _is_same(value.value, opened.metadata[key]):
            found.append(f"{key} is {_short(opened.metadata[key])}, not {_short(value.value)}")
    if opened.metadata.get("tokenizer.ggml.model") == "gpt2":
        found += _pretokenizer_differences(pre, tokenizer.backend_tokenizer)
    return found


def _pretokenizer_differences(pre: Any, core: Any) -> list[str]:
    """How a file's pre-tokenizer cuts text otherwise than the tokenizer, where one is known that does not."""
    try:
        known = find_pretokenizer(core)
    except ModelError:  # single characters, or one that was named by hand: the prompts' ids tell
        return []
    if pre == known or pre not in EXPRESSIONS or not (unlike := unlike_probes(core, pre)):
        return []
    return [f"tokenizer.ggml.pre is {pre}, which cuts {_short(unlike[0])} otherwise than {known}"]


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return abs(a - float(b)) <= 1e-6 * max(1.0, abs(a))
    if isinstance(a, list | tuple):
        return list(a) == list(b)
    return bool(a == b)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
