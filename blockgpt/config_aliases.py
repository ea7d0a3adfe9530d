"""What other programs call our keys. A flag or a file with one of these names is answered with the key's own name.

To add a name: a word in `ALIASES` if our key means the same, else a line in `NOT_KEYS`.
"""

# {key, or key=value: the names that others have for it}
NAMES_ELSEWHERE = {
    "learning_rate": "lr max_lr peak_lr lr_max base_lr",
    "min_lr": "lr_min final_lr end_lr",
    "lr_schedule": "scheduler schedule lr_scheduler lr_scheduler_type",
    "warmup_iters": "warmup warmup_steps num_warmup_steps lr_warmup_steps",
    "lr_decay_iters": "decay_steps lr_decay_steps",
    "max_iters": "steps iters iterations max_steps num_steps total_steps train_steps n_steps num_iters n_iters",
    "weight_decay": "wd decay l2",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "grad_clip": "clip gradient_clip gradient_clipping grad_norm_clip max_grad_norm clip_grad clip_grad_norm "
                 "gradient_clip_val",
    "batch_size": "bs batch mbs micro_batch micro_batch_size device_batch_size train_batch_size "
                  "per_device_train_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accum accumulation accumulate accumulation_steps gas",
    "n_layer": "layers n_layers num_layers depth num_hidden_layers",
    "n_head": "heads n_heads num_heads num_attention_heads nhead",
    "n_kv_head": "kv_heads n_kv_heads num_kv_heads num_key_value_heads n_kv",
    "n_embd": "d_model dim hidden hidden_size hidden_dim embed_dim n_embed emb_dim width",
    "d_ff": "ffn_dim ff_dim mlp_dim d_ffn intermediate_size dim_feedforward ffn_hidden_size",
    "block_size": "ctx ctx_len n_ctx context context_len context_length context_size seq_len seqlen seq_length "
                  "sequence_len sequence_length max_seq_len max_length",
    "vocab_size": "vocab n_vocab",
    "dropout": "drop dropout_rate p_dropout",
    "weight_tying": "tie tied tie_weights tie_embeddings tied_embeddings tie_word_embeddings",
    "rope_theta": "rope_base theta",
    "normalization": "norm norm_type",
    "position_encoding": "pos position positional pos_emb pos_encoding positional_encoding",
    "ffn_type": "ffn mlp mlp_type",
    "activation": "act act_fn hidden_act activation_function",
    "attention_backend": "backend attn_backend attn_implementation flash flash_attn flash_attention",
    "loss_chunk": "chunked_loss loss_chunk_size chunk_size num_loss_chunks fused_loss fused_linear_cross_entropy",
    "kernels": "use_kernels use_triton triton liger use_liger use_liger_kernel fused_kernels",
    "arch_preset": "arch model preset model_type architecture",
    "sliding_window": "window window_size",
    "dtype": "precision mixed_precision",
    "dtype=bfloat16": "bf16 bfloat16 amp",
    "dtype=float16": "fp16 float16 half",
    "dtype=float32": "fp32 float32",
    "device": "accelerator",
    "device=cpu": "cpu use_cpu no_cuda",
    "device=cuda": "cuda use_cuda gpu use_gpu",
    "device=mps": "mps use_mps",
    "compile": "torch_compile compile_model use_compile",
    "tf32": "allow_tf32 use_tf32",
    "activation_checkpointing=full": "gradient_checkpointing grad_checkpointing grad_ckpt checkpointing recompute",
    "use_fsdp": "fsdp fsdp2",
    "use_zero1": "zero zero1 zero_1",
    "tensor_parallel": "tp tp_size tensor_parallel_size",
    "run_name": "name run exp exp_name experiment experiment_name id wandb_run_name",
    "out_dir": "out outdir output output_dir save_dir log_dir results_dir",
    "dataset": "data dataset_name train_data",
    "data_dir": "data_path data_root",
    "seed": "random_seed rng_seed manual_seed",
    "checkpoint_interval": "save_every save_interval save_steps save_freq ckpt_interval ckpt_every checkpoint_every",
    "keep_last": "save_total_limit max_checkpoints",
    "keep_best": "save_best save_best_only",
    "eval_interval": "eval_every eval_steps eval_freq val_interval val_every",
    "log_interval": "log_every log_freq logging_steps print_every",
    "patience": "early_stop early_stopping early_stopping_patience",
    "init_from": "pretrained from_pretrained finetune load load_from ckpt checkpoint",
    "resume=auto": "auto_resume continue",
    "tracker=wandb": "wandb use_wandb log_wandb",
    "tracker_project": "project",
    "profile": "profiler trace",
    "dry_run": "dryrun estimate",
}
ALIASES = {alias: key for key, names in NAMES_ELSEWHERE.items() for alias in names.split()}

# {the names that others have for what is no key here: how it is done here}
ANSWERS = {
    "epochs epoch n_epochs num_epochs num_train_epochs":
        "--max_iters=N sets the optimizer steps of a run, --max_epochs=N refuses a run that reads its data more often",
    "tokens max_tokens train_tokens total_tokens":
        "--max_iters=N; a step has batch_size * gradient_accumulation_steps * block_size tokens",
    "global_batch_size total_batch_size":
        "a step has batch_size * gradient_accumulation_steps sequences, over all processes",
    "eval_iters eval_batches val_iters val_steps val_batches":
        "--eval_tokens=N sets how much is read, in tokens and not in batches",
    "betas adam_betas": "--beta1=… and --beta2=…",
    "momentum": "the optimizer is AdamW (--beta1=…)",
    "workers num_workers n_workers dataloader_num_workers": "batches are read without worker processes",
    "temperature temp top_k top_p prompt num_samples max_new_tokens": "sample.py continues text with a trained run",
    "decay_lr": "--lr_schedule=cosine or --lr_schedule=constant",
    "optimizer optim opt": "the optimizer is AdamW",
    "always_save_checkpoint": "--checkpoint_interval=N saves, --keep_best after each best evaluation, too",
    "resume_from resume_path resume_from_checkpoint":
        "--resume=must --run_name=NAME continues a run, --init_from=runs/NAME begins a new one with its weights",
    "gpus num_gpus n_gpus devices nproc nproc_per_node nnodes world_size ddp":
        "torchrun --standalone --nproc_per_node=N train.py … starts N processes",
    "config cfg config_file conf": "a config file needs no flag: python train.py config/arch_llama.py",
}
NOT_KEYS = {name: answer for names, answer in ANSWERS.items() for name in names.split()}
