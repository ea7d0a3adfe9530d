"""OLMo 2 (arXiv:2501.00656): norms on the outputs of the sublayers, QK-norm over all heads as one."""
arch_preset = "olmo2"
