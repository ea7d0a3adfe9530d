"""model_v1: RoPE, RMSNorm, SwiGLU, pre-norm, tied head."""
arch_preset = "team"
