"""The model and the chat rows that training benchmarks share: `python chat_workload.py FOLDER --rows 400`.

Every token is one word of a made-up language, so that row lengths are known exactly and both sides of a comparison
see the same token ids. Rows are `prompt` and `completion` turns, which every side teaches alike: completions only.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

CONTROL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
ROLES = ["system", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OVERHEAD = 6
"""Tokens of a row that the template writes: start, role and end of two turns."""
MEDIAN, SIGMA, SHORTEST, LONGEST = 150, 0.604, 16, 600
"""Row lengths are log-normal: median 150 tokens, mean 180."""
PROMPT_SHARE = 0.25

SIZES: dict[str, dict[str, int]] = {
    "5m": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "30m": {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    "tiny": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
"""Qwen3-like models with tied embeddings: 5.2 M and 31 M parameters, and one for trying a benchmark out."""


def words(count: int) -> list[str]:
    """Different two-, three- and four-syllable words."""
    syllables = [c + v for c in "bdfghjklmnprstvwz" for v in "aeiou"]
    made = []
    for number in range(count):
        high, low = divmod(number, len(syllables))
        upper, middle = divmod(high, len(syllables))
        made.append((syllables[upper - 1] if upper else "") + syllables[middle] + syllables[low])
    return made


def rows(count: int, *, vocabulary: list[str], seed: int) -> list[dict[str, Any]]:
    """Conversations of two turns with ragged lengths and a few frequent words among many rare ones."""
    draw = random.Random(seed)
    frequency = [1.0 / (rank + 10) for rank in range(len(vocabulary))]
    made = []
    for _ in range(count):
        length = round(draw.lognormvariate(0.0, SIGMA) * MEDIAN)
        spoken = min(max(length, SHORTEST), LONGEST) - OVERHEAD
        text = draw.choices(vocabulary, frequency, k=spoken)
        cut = max(1, round(spoken * PROMPT_SHARE))
        made.append(
            {
                "prompt": [{"role": "user", "content": " ".join(text[:cut])}],
                "completion": [{"role": "assistant", "content": " ".join(text[cut:])}],
            }
        )
    return made


def pairs(made: list[dict[str, Any]], *, vocabulary: list[str], seed: int) -> list[dict[str, Any]]:
    """The same rows with a rejected completion each, of another length drawn alike and about as long as the chosen one."""
    draw = random.Random(seed + 1)
    found = []
    for row in made:
        spoken = len(row["completion"][0]["content"].split())
        text = draw.choices(vocabulary, k=max(1, round(spoken * draw.uniform(0.7, 1.3))))
        rejected = [{"role": "assistant", "content": " ".join(text)}]
        found.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return found


def make(folder: Path, *, size: str, num_rows: int, seed: int = 0) -> dict[str, Any]:
    """Write folder/model, as Hugging Face has them, folder/rows.jsonl and folder/pairs.jsonl; return what they are."""
    import torch
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    from kitae.backends.cpu import CpuBackend

    sizes = SIZES[size]
    vocabulary = words(sizes["vocab_size"] - len(CONTROL) - len(ROLES) - 1)
    names = [*CONTROL, *ROLES, "<unk>", *vocabulary]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens([AddedToken(name, special=True) for name in CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        model_max_length=4096,
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        **sizes,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    made = rows(num_rows, vocabulary=vocabulary, seed=seed)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    of_pairs = pairs(made, vocabulary=vocabulary, seed=seed)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_pairs))
    taught = [len(row["completion"][0]["content"].split()) + 1 for row in made]
    lengths = [
        len(row["prompt"][0]["content"].split()) + n - 1 + OVERHEAD
        for row, n in zip(made, taught, strict=True)
    ]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": num_rows,
        "median_tokens": statistics.median(lengths),
        "mean_tokens": statistics.fmean(lengths),
        "longest": max(lengths),
        "taught_share": sum(taught) / sum(lengths),
        "fast_bfloat16": CpuBackend().supports("bfloat16")[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--rows", type=int, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(make(options.folder, size=options.size, num_rows=options.rows)))


if __name__ == "__main__":
    main()
