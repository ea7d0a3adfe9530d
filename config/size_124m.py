"""GPT-2's 124M shape, with nanoGPT's half a million tokens per step (on eight GPUs: 5 micro-batches each)."""
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 40
max_iters = 600_000
warmup_iters = 2000
learning_rate = 6e-4
beta2 = 0.95
eval_interval = 1000
eval_tokens = 1_048_576
