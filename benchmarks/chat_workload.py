"""The models and the chat rows that training benchmarks share: `python chat_workload.py FOLDER --rows 400`.

Every token is one word of a made-up language, so that row lengths are known exactly and both sides of a comparison
see the same token ids. Rows are `prompt` and `completion` turns, which every side teaches alike: completions only.
"""

from __future__ import annotations

import argparse
import json
import math
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

QUESTION_WORDS = 24
"""Words of a question to sample completions of."""
MEAN_COMPLETION = 120
"""Tokens after which an untrained model of sampling benchmarks ends a completion, on average."""
DEEPEST_ENDING = 12
"""Layers up to which that can be arranged (`ending`); completions of deeper models are as long as they may be."""

SIZES: dict[str, dict[str, Any]] = {
    "5m": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "30m": {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    "100m": {"vocab_size": 32768, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64},
    "42m-150k": {"vocab_size": 151936, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "13m-moe": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 64,
                "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64, "moe_intermediate_size": 192,
                "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1, "n_group": 4,
                "topk_group": 2, "first_k_dense_replace": 1},
    "tiny": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
"""Qwen3-like models with tied embeddings, one of them with the vocabulary of Qwen's models, two of the shapes of R1's
distillations to 1.5B and 8B parameters, for GPUs; one like DeepSeek-V3 (latent
attention, 16 experts of which 4 are used, embeddings not tied); and one for trying a benchmark out."""


def words(count: int) -> list[str]:
    """Different two-, three- and four-syllable words."""
    syllables = [c + v for c in "bdfghjklmnprstvwz" for v in "aeiou"]
    made = []
    for number in range(count):
        high, low = divmod(number, len(syllables))
        upper, middle = divmod(high, len(syllables))
        made.append((syllables[upper - 1] if upper else "") + syllables[middle] + syllables[low])
    return made


def rows(count: int, *, vocabulary: list[str], seed: int, length: int | None = None) -> list[dict[str, Any]]:
    """Conversations of two turns with ragged lengths and a few frequent words among many rare ones.

    With `length` all have that many tokens.
    """
    draw = random.Random(seed)
    frequency = [1.0 / (rank + 10) for rank in range(len(vocabulary))]
    made = []
    for _ in range(count):
        drawn = round(draw.lognormvariate(0.0, SIGMA) * MEDIAN)
        spoken = (length or min(max(drawn, SHORTEST), LONGEST)) - OVERHEAD
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


def questions(count: int, *, vocabulary: list[str], seed: int) -> list[dict[str, Any]]:
    """Prompts to sample completions of. No answer is right: what the completions earn is up to the benchmark's reward."""
    draw = random.Random(seed + 2)
    texts = (" ".join(draw.choices(vocabulary, k=QUESTION_WORDS)) for _ in range(count))
    return [{"prompt": [{"role": "user", "content": text}], "answer": "none"} for text in texts]


def make(
    folder: Path,
    *,
    size: str,
    num_rows: int,
    seed: int = 0,
    length: int | None = None,
    vocab_size: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write folder/model, as Hugging Face has them, and rows.jsonl, pairs.jsonl and questions.jsonl; return what they are.

    folder/sampler is the same model, changed to end its completions (`ending`). `vocab_size` takes the size's place.
    Weights are float32; made on a GPU, where models are large, they are bfloat16.
    """
    import torch
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedTokenizerFast, Qwen3Config

    from kitae.backends.cpu import CpuBackend

    sizes = SIZES[size] | ({} if vocab_size is None else {"vocab_size": vocab_size})
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
    is_moe = "n_routed_experts" in sizes
    config = (DeepseekV3Config if is_moe else Qwen3Config)(
        **sizes,
        max_position_embeddings=4096,
        tie_word_embeddings=not is_moe,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    parameters = sum(p.numel() for p in model.parameters())
    made = rows(num_rows, vocabulary=vocabulary, seed=seed, length=length)
    write(folder / "rows.jsonl", made)
    write(folder / "pairs.jsonl", pairs(made, vocabulary=vocabulary, seed=seed))
    write(folder / "questions.jsonl", questions(num_rows, vocabulary=vocabulary, seed=seed))
    if not is_moe and size != "8b":
        if sizes["num_hidden_layers"] <= DEEPEST_ENDING:
            ending(model)
        model.save_pretrained(folder / "sampler")
        tokenizer.save_pretrained(folder / "sampler")
    taught = [len(row["completion"][0]["content"].split()) + 1 for row in made]
    lengths = [
        len(row["prompt"][0]["content"].split()) + n - 1 + OVERHEAD
        for row, n in zip(made, taught, strict=True)
    ]
    return {
        "parameters": parameters,
        "rows": num_rows,
        "median_tokens": statistics.median(lengths),
        "mean_tokens": statistics.fmean(lengths),
        "longest": max(lengths),
        "taught_share": sum(taught) / sum(lengths),
        "mean_seen": sum(n * (n + 1) / 2 for n in lengths) / sum(lengths),
        "fast_bfloat16": device != "cpu" or CpuBackend().supports("bfloat16")[0],
    }


def ending(model: Any) -> None:
    """Let an untrained model sample its end token about once in MEAN_COMPLETION tokens, wherever it is.

    The first number of every embedding becomes the same and large, so that the first number of the last hidden state is
    about the same at every position; the end token's output weight for it then sets its logit above all others.
    """
    import torch

    weight = model.get_input_embeddings().weight
    end, vocab_size = model.config.eos_token_id, weight.shape[0]
    with torch.no_grad():
        weight[:, 0] = weight.std() * weight.shape[1] ** 0.5
        hidden = model.model(torch.randint(vocab_size, (8, 64), device=weight.device)).last_hidden_state
        weight[end, 0] += math.log(vocab_size / MEAN_COMPLETION) / hidden[..., 0].mean()


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, help="tokens of every row; default: ragged")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model is made")
    parser.add_argument("--vocab-size", type=int, help="instead of the size's own")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    made = make(
        options.folder,
        size=options.size,
        num_rows=options.rows,
        length=options.length,
        vocab_size=options.vocab_size,
        device=options.device,
    )
    print(json.dumps(made))


if __name__ == "__main__":
    main()
