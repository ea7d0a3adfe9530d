"""This project's GPT-2: learned positions, bias-free LayerNorm, GELU, post-norm, tied head."""
arch_preset = "gpt2"
