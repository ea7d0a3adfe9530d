"""The size of `make demo`: two minutes on two CPU cores, enough to see an architecture learn."""
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
max_iters = 800
learning_rate = 2e-3
eval_interval = 200
eval_tokens = 65_536
compile = False  # compilation takes longer than it saves in a run this short
