"""Three questions that everybody asks, on the embedded corpus at two sizes.

    python -m tools.ablate --plan studies/everybody_asks.py --dry_run
"""
question = ("Does RoPE help more than SwiGLU? Is pre-norm better than post-norm? Is RMSNorm faster than LayerNorm? "
            "(the first two by loss, the third by tokens/s)")
base = ["config/arch_gpt2.py", "--norm_position=pre", "--normalization=layernorm", "--eval_tokens=32_768",
        "--compile=False"]
variants = {
    "baseline": {},
    "rope": {"position_encoding": "rope"},
    "swiglu": {"ffn_type": "swiglu"},
    "post-norm": {"norm_position": "post"},
    "rmsnorm": {"normalization": "rmsnorm"},
}
sizes = {  # 0.51M tokens each
    "2L-64": ["config/size_tiny.py", "--max_iters=1000", "--eval_interval=250"],
    "4L-128": ["config/size_demo.py", "--max_iters=250", "--eval_interval=50"],
}
lr_sweep = [1e-3, 2e-3, 4e-3]  # post-norm trains at smaller rates than pre-norm; each variant gets its own
seeds = 6  # with three, the adjustment for the family would leave only very large differences
horizons = [0.5, 2]  # of the baseline, for the worth of a difference in tokens
margin = 0.01  # nats per byte
