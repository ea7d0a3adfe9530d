"""Qwen3 (arXiv:2505.09388): LLaMA with each head's queries and keys normalised, tied head."""
arch_preset = "qwen3"
