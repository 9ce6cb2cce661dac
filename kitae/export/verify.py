"""The gate: an export is compared with what it was made of, and refused where it says something else.

reference --greedy answers--> exam --> every candidate: tensors, distributions, greedy text, stops, template --> table

Where a model cannot be run here, its tensors are compared all the same, and the table says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae.errors import KitaeError, MissingExtraError, ModelError, PlanError
from kitae.export.convert import How
from kitae.export.gguf_lora import check_lora
from kitae.export.gguf_read import Opened, open_gguf
from kitae.export.gguf_vocab import load_template
from kitae.export.source import Source, open_source
from kitae.export.verify_answers import (
    TOP,
    Answers,
    Exam,
    Question,
    answers_of_dequantised,
    answers_of_folder,
    pose,
    sit,
    stop_ids_of,
    tokenizer_of,
)
from kitae.export.verify_llama import answers_alone, answers_of_llama_cpp, has_llama_cpp
from kitae.export.verify_metadata import end_differences, metadata_differences
from kitae.export.verify_tensors import Tensors, check_tensors
from kitae.export.weights import Weights, open_weights

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
TENSORS = "tensors only"
IN_LLAMA_CPP = "whether llama.cpp loads it, reads and renders text alike, and stops"


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
    not_checked: list[str] = field(default_factory=list)
    """What could not be, here."""

    def as_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__slots__ if name not in ("tensors",)}
        return {**own, "tensors": None if self.tensors is None else self.tensors.as_json()}


def verify(
    reference: str,
    candidates: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    base: str | None = None,
    dequantize: bool = False,
    prompts: Sequence[str] = PROMPTS,
    threads: int = 0,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Compare exports with the model or adapter they were made of; `passed` of the report says whether all are fit.

    `names` is what they are called, where that is not what their files are called; `say` is told what is done next.
    """
    source = open_source(reference, base=base, dequantize=dequantize)
    folder = source.adapter or source.weights.folder
    threads = How(output=Path(), num_workers=threads).threads
    paths = [Path(candidate).expanduser() for candidate in candidates]
    for path in paths:
        if not path.exists():
            raise ModelError(f"no such file or folder: {path}")
    alone = [is_adapter(path) for path in paths]
    if all(alone):
        asked = _Asked(why="adapters alone are compared by their tensors")
    else:
        say(f"{folder} answers {len(prompts)} prompts")
        asked = _ask_reference(source, folder, prompts)
    if source.adapter is not None and asked.exam is not None:
        say(f"{source.weights.folder} without the adapter answers them")
    rows = _rows_of_reference(source, asked)
    for path, name, is_alone in zip(paths, names or [path.name for path in paths], alone, strict=True):
        row = Checked(name=name, kind="", how=TENSORS)
        try:
            if is_alone:
                _check_adapter(row, path, source)
            else:
                _check(row, path, source, asked, threads=threads, say=say)
        except (PlanError, MissingExtraError):  # this machine cannot run it, which is no fault of the export
            raise
        except KitaeError as error:
            row.failures.append(str(error))
        rows.append(row)
    exam = asked.exam
    return {
        "command": "verify",
        "reference": str(folder),
        "base": str(source.weights.folder),
        "prompts": list(prompts) if exam is not None else [],
        "positions": sum(map(len, exam.forced)) if exam is not None else 0,
        "not_run": asked.why,
        "rows": [row.as_json() for row in rows],
        "passed": not any(row.failures for row in rows),
    }


# the reference ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The reference's part: what is asked, and what it said, or why it did not."""

    questions: list[Question] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    exam: Exam | None = None
    said: Answers | None = None
    why: str | None = None


def _ask_reference(source: Source, folder: Path, prompts: Sequence[str]) -> _Asked:
    """The exam with the reference's answers; where it cannot be run, as much as its tokenizer gives."""
    questions: list[Question] = []
    stop_ids: list[int] = []
    try:
        tokenizer = tokenizer_of(source.folder)
        template = load_template(tokenizer)
        questions, stop_ids = pose(tokenizer, template, prompts), stop_ids_of(tokenizer, template)
        exam, said = sit(
            folder,
            questions,
            base=source.weights.folder if source.adapter is not None else None,
            tokenizer=tokenizer,
            template=template,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        return _Asked(questions=questions, stop_ids=stop_ids, exam=exam, said=said)
    except KitaeError as error:
        log.warning("%s is not run, so what it says is compared with nothing: %s", folder, error)
        return _Asked(questions=questions, stop_ids=stop_ids, why=str(error))


def _rows_of_reference(source: Source, asked: _Asked) -> list[Checked]:
    """The table's first rows: the base of an adapter, and the reference."""
    exam, said = asked.exam, asked.said
    if exam is None or said is None:
        return []
    own = Checked(
        name="base" if source.adapter is None else "base+adapter",
        kind=_kind_of_weights(source.weights),
        how=said.how,
        stops=said.stop_ids,
        template=said.template,
    )
    return [own] if source.adapter is None else [_row_of_base(source, exam, said), own]


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


# one export -------------------------------------------------------------------------------------------------------


def is_adapter(path: Path) -> bool:
    """Whether a file is the GGUF of an adapter alone."""
    if not path.is_file():
        return False
    try:
        return bool(open_gguf(path).metadata.get("general.type") == "adapter")
    except KitaeError:  # damaged, which the check of a model says
        return False


def _check_adapter(row: Checked, path: Path, source: Source) -> None:
    """An adapter's own file: every A and B against what the adapter does."""
    if source.adapter is None:
        raise ModelError(
            f"{path.name} holds an adapter alone, which is compared with an adapter; name that one instead of "
            f"{source.weights.folder}"
        )
    row.kind = _kind_of_gguf(open_gguf(path))
    row.tensors = check_lora(source, path)
    row.failures += row.tensors.failures
    row.not_checked.append("what it says on its base in llama.cpp")


def _check(
    row: Checked, path: Path, source: Source, asked: _Asked, *, threads: int, say: Callable[[str], None]
) -> None:
    """A model: its tensors, its metadata, and what it says."""
    opened = open_gguf(path) if path.is_file() else None
    row.kind = _kind_of_gguf(opened) if opened is not None else _kind_of_weights(open_weights(path))
    say(f"the tensors of {row.name} are compared")
    row.tensors = check_tensors(source, path)
    row.failures += row.tensors.failures
    if opened is not None:
        row.failures += metadata_differences(opened, source)
    else:
        row.failures += end_differences(path, source)
    if asked.exam is not None and asked.said is not None:
        say(f"{row.name} answers the same prompts")
        answers = _ask(path, opened, source, asked.exam, asked.said, threads=threads)
        _judge(row, asked.said, answers)
        if opened is not None and not has_llama_cpp():
            row.not_checked.append(IN_LLAMA_CPP)
        return
    row.not_checked.append("log-probabilities and completions against the original's")
    if opened is None:
        row.not_checked.append("stop ids, template and token ids")
    elif asked.questions and has_llama_cpp():
        say(f"llama.cpp reads {row.name}")
        found = answers_alone(path, asked.questions, stop_ids=asked.stop_ids, threads=threads)
        row.how, row.stops = "llama.cpp, alone", found.stop_ids
        row.failures += found.failures
    else:
        row.not_checked.append(IN_LLAMA_CPP)


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
