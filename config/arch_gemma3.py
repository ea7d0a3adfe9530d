"""Gemma 3 (arXiv:2503.19786): sandwich norms, GEGLU, QK-norm; of six layers five see 512 tokens."""
arch_preset = "gemma3"
