"""GPT-2 (Radford et al. 2019) as this project has it: learned positions, bias-free LayerNorm, GELU, post-norm, tied."""
arch_preset = "gpt2"
