"""GPT-NeoX and Pythia: attention and FFN side by side, RoPE on a quarter of each head."""
arch_preset = "neox"
