"""Gemma 3 (arXiv:2503.19786): sandwich norms, GEGLU, QK-norm; five of six layers see 512 tokens."""
arch_preset = "gemma3"
