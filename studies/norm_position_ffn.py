"""Norm × position × FFN at two sizes, on the embedded corpus: which of LLaMA's three choices matters at this scale?

    python -m tools.ablate --plan studies/norm_position_ffn.py --dry_run
"""
question = "Which of RMSNorm, RoPE and SwiGLU improves a small pre-norm GPT-2 on Python code, and do they interact?"
base = ["config/arch_gpt2.py", "--norm_position=pre", "--eval_tokens=32_768", "--compile=False",
        "--learning_rate=2e-3"]
vary = {
    "normalization": ["layernorm_nobias", "rmsnorm"],
    "position_encoding": ["learned_absolute", "rope"],
    "ffn_type": ["standard", "swiglu"],
}
sizes = {  # 0.51M tokens each
    "2L-64": ["config/size_tiny.py", "--max_iters=1000", "--eval_interval=250"],
    "4L-128": ["config/size_demo.py", "--max_iters=250", "--eval_interval=50"],
}
seeds = 4
horizons = [0.5, 2]  # of the baseline, for the worth of a difference in tokens
margin = 0.01  # nats per byte
