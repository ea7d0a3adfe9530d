"""OLMo 2: norms on the sublayers' outputs, queries and keys normalised whole."""
arch_preset = "olmo2"
