"""Llama 3 (arXiv:2407.21783): LLaMA with RoPE's base at 500,000."""
arch_preset = "llama3"
