"""Train a checkpoint of transformers further. To take another model, edit the first line alone.

python train.py config/finetune_hf.py --dataset=mine --dry_run      what it is, and what it costs
python train.py config/finetune_hf.py --dataset=mine

The dataset is prepared with the checkpoint's tokenizer: python data/files/prepare.py --tokenizer FOLDER …
"""
init_from = "hf:Qwen/Qwen3-0.6B"  # or hf:path/to/folder, hf:Org/Name@REVISION

block_size = 1024  # at most the checkpoint's
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 500
learning_rate = 2e-5
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.0
beta2 = 0.95
eval_interval = 100
activation_checkpointing = "full"
