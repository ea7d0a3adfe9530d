"""This project's variant of GPT-2 (Radford et al. 2019): learned positions, bias-free LayerNorm, GELU, post-norm, tied."""
arch_preset = "gpt2"
