"""LLaMA 2's 7B shape, 4.2 million tokens per step, 2.1 trillion in total (on eight GPUs: 64 micro-batches each)."""
n_layer = 32
n_head = 32
n_embd = 4096
d_ff = 11008
block_size = 4096
vocab_size = 32000
batch_size = 2
gradient_accumulation_steps = 512
max_iters = 500_000
warmup_iters = 2000
learning_rate = 3e-4
min_lr = 3e-5
beta2 = 0.95
eval_interval = 1000
eval_tokens = 4_194_304
