"""The main axes with their defaults: copy this file and change a line."""
arch_preset = "custom"
normalization = "layernorm_nobias"
norm_position = "pre"
ffn_type = "standard"
activation = "gelu"
position_encoding = "learned_absolute"
attention_backend = "sdpa"
bias = False
weight_tying = True
dropout = 0.0
