"""GPT-NeoX (arXiv:2204.06745), Pythia (arXiv:2304.01373): parallel attention and FFN, RoPE on a quarter of a head."""
arch_preset = "neox"
