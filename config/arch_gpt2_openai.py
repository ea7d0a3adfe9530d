"""GPT-2 as released (Radford et al. 2019): pre-norm with biases everywhere.

With config/size_124m.py and vocab_size=50257: 124,439,808 parameters.
"""
arch_preset = "gpt2_openai"
