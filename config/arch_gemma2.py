"""Gemma 2 (arXiv:2408.00118): sandwich norms, GEGLU, softcaps, every other layer sees 4,096 tokens."""
arch_preset = "gemma2"
