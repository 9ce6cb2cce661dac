"""Llama 2 and 3, and the R1 distillations made of them."""

from kitae.models.families import Family

FAMILY = Family(name="llama", model_types=("llama",))
