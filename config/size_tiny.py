"""A run of a few seconds, to try an idea or for a test."""
n_layer = 2
n_head = 2
n_embd = 64
block_size = 64
batch_size = 8
max_iters = 200
eval_interval = 100
eval_tokens = 16_384
