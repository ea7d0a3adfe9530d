"""RoPE in a GPT-2 body: bias-free LayerNorm, GELU, pre-norm, tied head."""
arch_preset = "hybrid"
