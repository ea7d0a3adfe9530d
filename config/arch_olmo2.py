"""OLMo 2 (arXiv:2501.00656): norms on the sublayers' outputs, queries and keys normalised whole."""
arch_preset = "olmo2"
