"""Small random models with a character tokenizer, saved as ordinary Hugging Face folders.

The quickstart trains one, and the tests are made of them: nothing has to be downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

Family = Literal["qwen2", "qwen3", "llama", "deepseek_v3"]

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
ROLES = ["system\n", "user\n", "assistant\n"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% set content = m['content'].split('</think>')[-1].lstrip('\\n')"
    " if m['role'] == 'assistant' and strip_thinking else m['content'] %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + prefill }}{% endif %}"
)


def make_tokenizer(*, prefill: str = "", strip_thinking: bool = False, extra: str = "") -> Any:
    """A character-level tokenizer with chat tokens; with `prefill` and `strip_thinking` its template acts like R1's.

    Returned is a transformers PreTrainedTokenizerFast. Characters outside printable ASCII and `extra` are unknown.
    """
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *map(chr, range(32, 127)), *extra]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *TAGS, *ROLES, "<unk>", *characters])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS + ROLES])
    template = CHAT_TEMPLATE.replace("prefill }}", f"{prefill!r} }}}}" if prefill else "'' }}")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=template.replace("strip_thinking", "true" if strip_thinking else "false"),
        model_max_length=4096,
    )


def make_config(family: Family, *, vocab_size: int, **sizes: Any) -> Any:
    """A transformers configuration of the family at toy size; `sizes` overrides any of its fields."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if family == "qwen3":
        return transformers.Qwen3Config(**{**common, "head_dim": 16, "tie_word_embeddings": True, **sizes})
    if family == "qwen2":
        return transformers.Qwen2Config(**{**common, "tie_word_embeddings": True, **sizes})
    if family == "llama":
        return transformers.LlamaConfig(**{**common, "tie_word_embeddings": False, **sizes})
    moe = {
        "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    return transformers.DeepseekV3Config(**{**common, **moe, **sizes})


def make_model(
    folder: str | Path, family: Family = "qwen3", *, tokenizer: Any = None, seed: int = 0, **sizes: Any
) -> Path:
    """Save a randomly initialised float32 model and its tokenizer to `folder`, as from_pretrained reads them."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer if tokenizer is not None else make_tokenizer()
    sizes.setdefault("eos_token_id", tokenizer.eos_token_id)
    sizes.setdefault("pad_token_id", tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = make_config(family, vocab_size=-(-len(tokenizer) // 16) * 16, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.01)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
