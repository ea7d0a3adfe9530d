"""GPT-2 (Radford et al. 2019) in this project's variant: learned positions, bias-free LayerNorm, GELU, post-norm, tied."""
arch_preset = "gpt2"
