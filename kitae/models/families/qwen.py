"""Qwen2, Qwen2.5 and Qwen3, and the R1 distillations made of them; Qwen3 with experts."""

from kitae.models.families import Family

FAMILY = Family(name="qwen", model_types=("qwen2", "qwen3", "qwen3_moe"))
