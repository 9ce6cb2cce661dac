"""The form instruction: what a base model is told, so that its first rollouts can have the form that is rewarded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Literal

Form = Literal["answer_tags", "boxed"]
Language = Literal["en", "ja", "zh"]

INSTRUCTIONS: dict[Form, dict[Language, str]] = {
    "answer_tags": {
        "en": (
            "You are a helpful assistant. You first think about the reasoning process and then give the user the "
            "answer. Put the reasoning in <think> </think> and the final answer alone in <answer> </answer>, that is: "
            "<think>reasoning here</think><answer>answer here</answer>"
        ),
        "ja": (
            "あなたは役に立つアシスタントです。まず考え方を順に整理し、それから答えを示してください。"
            "考え方は <think> </think> の中に、最終的な答えだけを <answer> </answer> の中に書きます。すなわち、"
            "<think>ここに考え方</think><answer>ここに答え</answer>"
        ),
        "zh": (
            "你是一个乐于助人的助手。请先思考推理过程，再给出答案。"
            "推理过程写在 <think> </think> 中，最终答案单独写在 <answer> </answer> 中，即："
            "<think>推理过程</think><answer>答案</answer>"
        ),
    },
    "boxed": {
        "en": (
            "You are a helpful assistant. Please reason step by step inside <think> </think>, "
            "then put your final answer within \\boxed{}."
        ),
        "ja": (
            "あなたは役に立つアシスタントです。<think> </think> の中で順を追って考え、"
            "最後の答えを \\boxed{} の中に書いてください。"
        ),
        "zh": "你是一个乐于助人的助手。请在 <think> </think> 中逐步推理，并把最终答案写在 \\boxed{} 中。",
    },
}


def form_instruction(texts: Iterable[str], *, form: Form = "answer_tags") -> str:
    """The system prompt that asks for the rewarded form, in the language of the texts (the first 200 are read)."""
    return INSTRUCTIONS[form][language_of(texts)]


def language_of(texts: Iterable[str]) -> Language:
    """English, Japanese or Chinese, by script: kana among the ideographs means Japanese.

    Ideographs and kana are weighed against words in Latin letters, so that formulas do not outvote the prose.
    """
    sample = "\n".join(islice(texts, 200))
    kana = len(re.findall("[\u3040-\u30ff]", sample))
    han = len(re.findall("[\u3400-\u9fff]", sample))
    latin = len(re.findall("[A-Za-z]{2,}", sample))
    if kana + han <= latin:
        return "en"
    return "ja" if kana > 0.05 * (kana + han) else "zh"
