"""A variant of GPT-2 (Radford et al. 2019): learned positions, bias-free LayerNorm, GELU, post-norm, tied head."""
arch_preset = "gpt2"
