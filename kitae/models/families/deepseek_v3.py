"""DeepSeek-V3 and R1: latent attention (MLA), routed and shared experts."""

from kitae.models.families import Family

FAMILY = Family(name="deepseek_v3", model_types=("deepseek_v3",))
