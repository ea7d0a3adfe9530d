"""GPT-NeoX (arXiv:2204.06745), Pythia (arXiv:2304.01373): attention and FFN in parallel, RoPE on a quarter of each head."""
arch_preset = "neox"
