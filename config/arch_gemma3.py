"""Gemma 3: sandwich norms, GEGLU, QK-norm; of six layers five see 512 tokens."""
arch_preset = "gemma3"
