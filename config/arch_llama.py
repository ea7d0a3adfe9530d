"""LLaMA: RoPE, RMSNorm, SwiGLU, pre-norm, untied head."""
arch_preset = "llama"
