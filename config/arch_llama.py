"""LLaMA (arXiv:2302.13971): RoPE, RMSNorm, SwiGLU, pre-norm, untied head."""
arch_preset = "llama"
