"""Llama 3: LLaMA with RoPE's base at 500,000."""
arch_preset = "llama3"
