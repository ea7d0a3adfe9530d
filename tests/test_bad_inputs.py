"""Mistakes of a user: each ends in one line that says what is wrong, where and how to fix it, and changes nothing.

A row is a command, its exit code and a pattern of its line after "error: ". `runpy` runs the command's script as
`python` would, but in this process, which has torch loaded; a command with `$` in front runs in a new process.
"""

import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import sys

import pytest
from conftest import ROOT, run_python

from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer, CharTokenizer

# A small model on the dataset `chars`: what a row adds to it is what is wrong.
TINY = """
n_layer, n_head, n_embd, block_size, batch_size, max_iters = 1, 2, 16, 16, 2, 2
dataset, data_dir, device, mfu_peak = "chars", "data", "cpu", 1
"""

CONFIG_FILES = {  # name: (text, the line after the file's name)
    "syntax": ("n_layer = = 3", "SyntaxError: .*line 1"),
    "indented": ("n_layer = 2\n  n_head = 2", "IndentationError: .*line 2"),
    "binary": (bytes(range(256)), "SyntaxError: .*null bytes"),
    "latin1": ("dataset = 'é'".encode("latin-1"), "SyntaxError: .*utf-8"),
    "exception": ("n_layer = 2\nn_head = n_layer / 0", "line 2: ZeroDivisionError: division by zero"),
    "two_lines": ("raise ValueError('one\\ntwo')", "line 1: ValueError: one two"),
    "leaves": ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
    "endless": ("def _f(): _f()\n_f()", "line 1: RecursionError"),
    "no_module": ("from config.arch_lama import *", "line 1: ModuleNotFoundError: .*config.arch_lama"),
    "bad_module": ("from syntax import *", "line 1: .*Error: .*syntax"),
    "no_value": ("n_layer", "line 1: NameError: .*n_layer"),
    "unknown_key": ("n_layers = 2", r"n_layers: no such key \(did you mean n_layer\?\)"),
    "own_name": ("def helper(): pass", "helper: no such key .*_helper"),
    "text": ("n_layer = '2'", "n_layer: '2' is str, not int"),
    "fraction": ("n_layer = 2.5", "n_layer: 2.5 is float, not int"),
    "boolean": ("n_layer = True", "n_layer: True is bool, not int"),
    "no_boolean": ("tf32 = 1", "tf32: 1 is int, not bool"),
    "nothing": ("n_layer = None", "n_layer: None is NoneType, not int"),
    "nested": ("n_layer = [1, 2]", r"n_layer: \[1, 2\] is list, not int"),
    "dictionary": ("arch_preset = {}", "arch_preset: {} is dict, not str"),
    "endless_mixture": ("dataset = {}\ndataset['chars'] = dataset", "dataset: is nested too deeply"),
    "array": ("import numpy as _n\ndataset = {'a': _n.ones(2)}", "dataset: the weight of a is array"),
    "function": ("def n_layer(): return 2", "n_layer: <function .* is function, not int"),
    "overflow": ("learning_rate = 10 ** 400", "learning_rate: .* is out of range"),
    "unprintable": ("n_layer = 10 ** 5000", "n_layer: <int> is out of range, must be at most 10000"),
    "not_finite": ("learning_rate = float('inf')", "learning_rate: inf is not a finite number"),
    "control": ("out_dir = 'a\\0b'", r"out_dir: 'a\\x00b' has characters that cannot be printed"),
    "activated": ("ffn_type, activation = 'swiglu', 'relu'", "activation: 'relu' is incompatible .*swiglu.*drop it"),
    "out_dir": ("resume, run_name, out_dir = 'must', 'good', 5", "out_dir: 5 is int, not str"),
    "renamed": ("keep_checkpoints = 3", "keep_checkpoints: was renamed to keep_last$"),
    "replaced": ("init_from = 'resume'", "init_from: 'resume' was replaced by resume='must'"),
}

META = {  # name: (change to the meta.json of a good dataset, the line after its path)
    "no_vocab": (lambda meta: meta.pop("vocab_size"), "vocab_size is missing"),
    "vocab_text": (lambda meta: meta.update(vocab_size="11"), "vocab_size is '11', not of type int"),
    "no_vocabulary": (lambda meta: meta.update(vocab_size=0), "vocab_size is 0"),
    "dtype": (lambda meta: meta.update(dtype="float16"), "dtype is 'float16', not one of uint16, uint32"),
    "newer": (lambda meta: meta.update(schema_version=99), "schema_version is 99, this program reads 1"),
    "miscounted": (lambda meta: meta["splits"]["train"].update(tokens=7), "tokens is 7, but its files hold 2200"),
    "one_split": (lambda meta: meta["splits"].pop("val"), "splits.val is not an object"),
    "elsewhere": (lambda meta: meta["splits"]["val"]["files"].update({"../val.bin": {}}), "'../val.bin' is not"),
    "tokenizer": (lambda meta: meta.update(tokenizer="char"), "tokenizer is 'char', not of type dict"),
}

RUN_JSON = {  # name: (content of the run.json of a run to resume, its line)
    "no_json": ("{", "--run_name: runs/no_json/run.json cannot be read"),
    "no_text": (b"\xff\xfe", "--run_name: runs/no_text/run.json cannot be read"),
    "empty": ("", "--run_name: runs/empty/run.json cannot be read"),
    "list": ("[]", "--run_name: runs/list/run.json cannot be read"),
    "no_config": ("{}", "--run_name: runs/no_config/run.json cannot be read"),
    "config_list": ('{"config": []}', "--run_name: runs/config_list/run.json cannot be read"),
    "deep": ("[" * 100_000, "--run_name: runs/deep/run.json cannot be read"),
    "wrong_type": ('{"config": {"n_layer": "2"}}', "runs/wrong_type/run.json: n_layer: '2' is str, not int"),
    "gone": ('{"config": {"ffn_type": "x"}}', "runs/gone/run.json: ffn_type: 'x' is unknown .*one of standard"),
    "impossible": ('{"config": {"n_head": 7}}', "runs/impossible/run.json: n_head: 7 does not divide"),
}

COMMANDS = [
    # the command line
    ("$ train.py --n_layers=3", 2, r"--n_layers: no such key \(did you mean --n_layer=3\?\)"),
    ("train.py --N-LAYER=3", 2, r"--N-LAYER: .*did you mean --n_layer=3\?"),
    ("train.py --lr 3e-4", 2, r"--lr: no such key \(did you mean --learning_rate=3e-4\?\)"),
    ("train.py --no-dropout", 2, r"--no-dropout: dropout is not a boolean"),
    ("sample.py --run=runs/good --top-k=0", 2, "--top_k: 0 is out of range"),
    ("compare_architectures.py --out-dir=nowhere", 2, "no such directory: nowhere"),
    ("data/files/prepare.py --name=x --input=tiny.py --val-fraction=0", 2, "--val_fraction: 0.0 is out of range"),
    ("train.py --n_layer", 2, r"--n_layer: needs a value \(--n_layer=…\)"),
    ("train.py --n_layer --n_head=2", 2, "--n_layer: needs a value"),
    ("train.py --n_layer tiny.py", 2, "--n_layer: needs a value"),
    ("train.py --n_layer=", 2, "--n_layer: '' is not a whole number"),
    ("train.py --n_layer=two", 2, "--n_layer: 'two' is not a whole number"),
    ("train.py --n_layer=2.5", 2, "--n_layer: '2.5' is not a whole number"),
    ("train.py --n_layer=nan", 2, "--n_layer: 'nan' is not a whole number"),
    ("train.py --n_layer=1e400", 2, "--n_layer: '1e400' is not a whole number"),
    ("train.py --n_layer=1e300", 2, "--n_layer: 1.* is out of range, must be at most 10000$"),
    ("train.py --n_layer=None", 2, "--n_layer: 'None' is not a whole number"),
    ("train.py --n_layer=" + 9999 * "9", 2, "--n_layer: .{10,100} is not a whole number$"),
    ("train.py --n_layer=0", 2, "--n_layer: 0 is out of range, must be at least 1"),
    ("train.py --seed -1", 2, "--seed: -1 is out of range, must be at least 0"),
    ("train.py --max_iters=1e19", 2, "--max_iters: 10000000000000000000 is out of range"),
    ("train.py --learning_rate=fast", 2, "--learning_rate: 'fast' is not a number"),
    ("train.py --learning_rate=nan", 2, "--learning_rate: nan is not a finite number"),
    ("train.py --learning_rate=1e400", 2, "--learning_rate: inf is not a finite number"),
    ("train.py --learning_rate=-1", 2, "--learning_rate: -1.0 is out of range, must be above 0"),
    ("train.py --dropout=1", 2, "--dropout: 1.0 is out of range, must be below 1"),
    ("train.py --tf32=maybe", 2, r"--tf32: 'maybe' is not a boolean \(True or False\)"),
    ("train.py --tf32 maybe", 2, "--tf32: 'maybe' is not a boolean"),
    ("train.py --mfu_peak=spars", 2, r"--mfu_peak: 'spars' is not dense, sparse, or TFLOP/s above 0"),
    ("train.py --mfu_peak=0", 2, "--mfu_peak: 0.0 is not dense, sparse, or"),
    ("train.py --normalization=rms", 2, r"--normalization: 'rms' is unknown \(did you mean rmsnorm\?\)"),
    ("train.py --arch_preset=lama", 2, r"--arch_preset: 'lama' is unknown \(did you mean llama\?\)"),
    ("train.py --init_from=resume", 2, "--init_from: 'resume' was replaced by resume='must'"),
    ("train.py --init_from=runs/nowhere", 2, "--init_from: there is no run runs/nowhere"),
    ("train.py --init_from", 2, "--init_from: needs a value"),
    ("train.py --peer_timeout 9", 2, "--peer_timeout: was renamed to --rank_timeout$"),
    ("train.py -n_layer=3", 2, r"'-n_layer=3': neither a config file .*did you mean --n_layer=3\?"),
    ("train.py n_layer=3", 2, r"'n_layer=3': neither a config file .*did you mean --n_layer=3\?"),
    ("train.py —n_layer=3", 2, r"'—n_layer=3': neither a config file .*did you mean --n_layer=3\?"),
    ("train.py train", 2, r"'train': neither a config file \(\*.py\) nor --key=value"),
    ("train.py ''", 2, "'': neither a config file"),
    ("train.py --", 2, "'--': neither a config file"),
    ("train.py --=3", 2, "'--=3': neither a config file"),
    ("train.py config/arch_lama.py", 2, r"config/arch_lama.py: no such config file .*did you mean config/arch_llama"),
    (f"train.py {5000 * 'x'}.py", 2, r"x+\.py: no such config file \(did you mean config/"),
    ("train.py folder.py", 2, "folder.py: not a file"),
    ("train.py tiny.json", 2, "'tiny.json': neither a config file"),
    # names
    ("train.py --run_name=", 2, "--run_name: is empty"),
    ("train.py --run_name=a/b", 2, r"--run_name: 'a/b' is not the name of a folder \(no slash"),
    ("train.py --run_name=..", 2, r"--run_name: '\.\.' is not the name of a folder"),
    ("train.py --run_name=' a'", 2, "--run_name: ' a' is not the name of a folder"),
    ("train.py --run_name='a\nb'", 2, r"--run_name: 'a\\nb' has characters that cannot be printed"),
    (f"train.py --run_name={128 * 'é'}", 2, "--run_name: .* at most 255 bytes"),
    ("train.py --dataset=../data/chars", 2, "--dataset: '../data/chars' is not the name of a folder"),
    ("train.py --out_dir=", 2, "--out_dir: is empty"),
    # combinations
    ("train.py --n_embd=100 --n_head=3", 2, r"--n_head: 3 does not divide n_embd=100 \(one of 1, 2, 4, 5, "),
    ("train.py tiny.py --n_embd=15", 2, "tiny.py: n_head: 2 does not divide n_embd=15"),
    ("train.py --n_head=4 --n_kv_head=3", 2, r"--n_kv_head: 3 does not divide n_head=4 \(one of 1, 2, 4"),
    ("train.py --position_encoding=rope --head_dim=7", 2, "--position_encoding: .*not head_dim=7 .*change"),
    ("train.py --ffn_type=swiglu --activation=gelu", 2, "--activation: 'gelu' is incompatible with .*swiglu"),
    ("train.py --activation=silu --arch_preset=llama", 2, "--activation: .*drop it, set it to None, or use"),
    ("train.py --activation=silu --ffn_type=geglu", 2, "--activation: 'silu' is incompat.* gelu or gelu_tanh"),
    ("train.py --attention_backend=flash", 2, r"--attention_backend: .*'flash' is unknown \(one of auto, sdpa, "),
    ("train.py --attention_backend=sdpa --attn_softcap=50", 2,
     r"--attention_backend: sdpa does not support attn_softcap=50 \(use manual or flex"),
    ("train.py --attn_softcap=50 --attention_backend=flex --dropout=0.1", 2, r"--attention_backend: .*\(use manual"),
    ("train.py --window_pattern=SSG", 2, "--window_pattern: .*'SSG' has other letters than S .* and L"),
    ("train.py --position_encoding=rope --rope_fraction=0.01", 2, "--position_encoding: .*rope_fraction=0.01 .*change"),
    ("train.py --norm_position=post --parallel_block=two_norms", 2, "--parallel_block: .*one_norm, or another"),
    ("train.py --value_embeddings=3", 2, r"--value_embeddings: .*n_layer=4 \(at most 2\)"),
    ("train.py --embedding_scale=root", 2, r"--embedding_scale: .*'root' is unknown \(a number, or sqrt"),
    ("train.py --loss_chunk=some", 2, r"--loss_chunk: 'some' is unknown \(a number of tokens, or auto"),
    ("train.py --loss_chunk=-1", 2, "--loss_chunk: .*-1"),
    ("train.py --min_lr=1", 2, "--min_lr: 1 is above learning_rate=0.001"),
    ("train.py --warmup_iters=9 --lr_decay_iters=8", 2, "--lr_decay_iters: .*8 ends before warmup_iters=9 .*raise it"),
    ("WORLD_SIZE=3 train.py --gradient_accumulation_steps=4", 2, "--gradient_accumulation_steps: 4 .*steps=3 or 6\\)"),
    ("WORLD_SIZE=3 train.py --resume=must --run_name=good", 2, "runs/good/run.json: gradient_accumulation_steps: 1 "),
    ("WORLD_SIZE=many train.py", 2, "WORLD_SIZE: 'many' is not a number of processes"),
    ("WORLD_SIZE=0 train.py", 2, "WORLD_SIZE: '0' is not a number of processes"),
    ("RANK=1 train.py", 2, "RANK: '1' is not .* of WORLD_SIZE=1 processes .*unset RANK"),
    ("LOCAL_RANK=x train.py", 2, "LOCAL_RANK: 'x' is not .* of WORLD_SIZE=1 processes"),
    # the processes of a run
    ("train.py --use_zero1 --use_fsdp", 2, r"--use_zero1: True is incompatible with use_fsdp=True.*=False\)"),
    ("train.py --tensor_parallel=2", 2, "--tensor_parallel: 2 does not divide the 1 processes"),
    ("WORLD_SIZE=8 train.py --tensor_parallel=8 --n_head=4", 2, "--tensor_parallel: 8 does not divide n_head=4"),
    ("WORLD_SIZE=2 train.py --tensor_parallel=2 --n_kv_head=1", 2, "--tensor_parallel: .* not divide n_kv_head=1"),
    ("WORLD_SIZE=2 train.py --tensor_parallel=2 --d_ff=99", 2, "--tensor_parallel: .* not divide d_ff=99"),
    ("WORLD_SIZE=2 train.py --tensor_parallel=2 --use_zero1", 2, "--tensor_parallel: 2 is incompatible with use_zero1"),
    ("WORLD_SIZE=4 train.py --tensor_parallel=2", 2, "--tensor_parallel: 2 of 4 processes .* only use_fsdp=True"),
    ("WORLD_SIZE=2 train.py --tensor_parallel=2 --compile", 2, "--compile: True is incompatible with tensor_parallel"),
    ("WORLD_SIZE=2 train.py --tensor_parallel=2 --kernels=triton", 2, "--kernels: 'triton' is incompatible with tens"),
    ("WORLD_SIZE=2 train.py --tensor_parallel=2 --attention_backend=flex", 2, "--attention_backend: 'flex' is incomp"),
    ("WORLD_SIZE=4 train.py --use_fsdp --dp_replicate=3 --gradient_accumulation_steps=4", 2,
     "--dp_replicate: 3 does not divide the 4 data-parallel processes"),
    ("train.py --activation_checkpointing=some", 2, "--activation_checkpointing: .*'some' is unknown .*full"),
    ("train.py --use_fsdp --dtype=float16", 2, "--dtype: 'float16' .* cannot be sharded"),
    # runs
    ("train.py tiny.py --run_name=good", 2,
     r"--run_name: runs/good exists \(--resume=auto to continue it, or another name\)"),
    ("train.py --resume=auto", 2, "--resume: 'auto' needs --run_name=NAME"),
    ("train.py --resume=latest --run_name=good", 2, r"--resume: 'latest' is unknown \(one of never, auto, must\)"),
    ("train.py --resume=auto --run_name=good --seed=2", 2, "--seed: .* made with 1337 .*or --resume_force"),
    ("train.py --resume=auto --run_name=damaged", 3, "runs/damaged has no usable checkpoint"),
    ("train.py tiny.py --keep_last=1", 2, "--keep_last: 1 is out of range, must be at least 2"),
    ("train.py tiny.py --out_dir=tiny.py", 2, "tiny.py/.*: cannot be written: Not a directory .*--out_dir"),
    ("train.py --resume=must", 2, "--resume: 'must' needs --run_name=NAME"),
    ("train.py --resume=must --run_name=god", 2, r"--run_name: .*no run runs/god .*did you mean good\?"),
    ("train.py --resume=must --run_name=good --out_dir=nowhere", 2, "--run_name: .*no run nowhere/good to resume"),
    ("train.py --resume=must --run_name=file", 2, "--run_name: runs/file/run.json cannot be read"),
    ("train.py --resume=must --run_name=good --n_layer=2", 2, "--n_layer: the run was made with 1"),
    ("train.py --resume=must --run_name=good --seed=2", 2, "--seed: the run was made with 1337"),
    ("train.py --resume=must --run_name=good --dataset=bytes", 2, "--dataset: .* made with 'chars'"),
    ("train.py --resume=must --run_name=good --batch_size=4", 2, "--batch_size: .* takes 2 sequences .*not 4"),
    ("train.py --resume=must --run_name=hollow", 3, "runs/hollow has no usable checkpoint"),
    ("train.py --resume=must --run_name=damaged", 3, "runs/damaged has no usable checkpoint"),
    ("train.py --resume=must --run_name=good --data_dir=other", 3, "runs/good/.*: was made on other data"),
    # the device
    ("train.py tiny.py --device=gpu", 2, "--device: 'gpu' is unknown .*cuda"),
    ("train.py tiny.py --device=cuda:one", 2, "--device: 'cuda:one' is unknown .*cuda:1"),
    ("$ CUDA_VISIBLE_DEVICES= train.py tiny.py --device=cuda", 2, "--device: 'cuda': .*--device=cpu"),
    ("train.py tiny.py --device=cuda:999", 2, "--device: 'cuda:999'"),
    ("train.py tiny.py --dtype=float16", 2, "--dtype: 'float16' .*cpu .*--dtype=bfloat16"),
    ("train.py tiny.py --kernels=triton", 2, r"--kernels: 'triton'.* \(.*--kernels=auto\)"),
    ("train.py tiny.py --attention_backend=flex", 2, r"--attention_backend: 'flex' has no "
     r"backward pass on cpu, only on cuda \(use sdpa or manual here\)"),
    # a dry run
    ("train.py tiny.py --dry_run --dry_run_gpu=B20", 2, r"--dry_run_gpu: .*'B20' .*did you mean B200\?"),
    ("train.py tiny.py --dry_run --dry_run_gpu='RTX 4090 Laptop GPU'", 2, "--dry_run_gpu: .* is not in the table"),
    ("train.py tiny.py --dry_run --dry_run_gpu=", 2, "--dry_run_gpu: is empty"),
    ("train.py tiny.py --dry_run --dry_run_gpu=T4 --dtype=bfloat16", 2, "--dtype: .* T4 has none .*--dtype=float16"),
    ("train.py tiny.py --dry_run --dry_run_gpus=0", 2, "--dry_run_gpus: 0 is out of range"),
    ("train.py tiny.py --dry_run --dry_run_gpus=2 --gradient_accumulation_steps=3", 2, ".*steps: 3 .*steps=2 or 4;"),
    ("train.py tiny.py --dry_run --dry_run_mfu=40", 2, "--dry_run_mfu: 40.* is out of range, must be at most 1"),
    ("train.py tiny.py --dry_run --eval_only", 2, "--dry_run: is incompatible with eval_only"),
    ("train.py tiny.py --dry_run --dataset=char", 2, r"dataset 'char' does not exist: .*did you mean chars\?"),
    ("train.py tiny.py --dry_run --dataset=shakespeare_char", 2, "dataset .* is not prepared: run python .*/data/"),
    ("train.py tiny.py --dry_run --dataset=flipped", 2, "data/flipped/val.bin: is damaged: its sha256"),
    ("train.py tiny.py --dry_run --block_size=2200", 2, ".*block_size=2200 .* train split"),
    ("train.py tiny.py --dry_run --vocab_size=10", 2, "--vocab_size: 10 is too small for chars"),
    # the data
    ("train.py tiny.py --mask_documents", 2, "--mask_documents: dataset chars has no end-of-text token"),
    ("train.py tiny.py --causal=False", 2, "--causal: False lets every token attend to the token that it"),
    ("$ train.py tiny.py --dataset=char", 2, r"dataset 'char' does not exist: .*did you mean chars\?"),
    ("train.py tiny.py --data_dir=nowhere", 2, "dataset 'chars' does not exist: no nowhere/chars/meta.json"),
    ("train.py tiny.py --dataset=shakespeare_char", 2, "dataset .* is not prepared: run python /.*/data/.*prepare.py"),
    ("train.py tiny.py --dataset=truncated", 2, "data/truncated/train.bin: has 4398 bytes, meta.json says 4400"),
    ("train.py tiny.py --dataset=padded", 2, "data/padded/train.bin: has 4402 bytes, .*make it again"),
    ("train.py tiny.py --dataset=flipped", 2, "data/flipped/val.bin: is damaged: its sha256"),
    ("train.py tiny.py --dataset=beyond", 2, "data/beyond/train.bin: .*token id 11, beyond vocab_size=11"),
    ("train.py tiny.py --dataset=lost", 2, "data/lost/val.bin: cannot be read: No such file"),
    ("train.py tiny.py --dataset=meta_text", 2, "data/meta_text/meta.json: is not JSON"),
    ("train.py tiny.py --dataset=meta_folder", 2, "data/meta_folder/meta.json: cannot be read: Is a directory"),
    ("train.py tiny.py --block_size=2200", 2, r".*block_size=2200 .* train split .*\(--block_size=2199 or smaller"),
    ("train.py tiny.py --block_size=200", 2, r".*block_size=200 .* val split .*\(--block_size=199 or smaller"),
    ("train.py tiny.py --vocab_size=10", 2, r"--vocab_size: 10 is too small for chars, .* 11 .*\(drop the key"),
    # mixtures
    ("train.py tiny.py --dataset=\"{'chars': 0.5\"", 2,
     r"--dataset: .* is not a Python dict or list .*quote it"),
    ("train.py tiny.py '--dataset={}'", 2, r"--dataset: \{\} has no weight above 0"),
    ("train.py tiny.py --dataset=\"{'chars': 0}\"", 2, "--dataset: .* has no weight above 0"),
    ("train.py tiny.py --dataset=\"{'../chars': 1}\"", 2,
     r"--dataset: '../chars' is not the name of a folder"),
    ("train.py tiny.py --dataset=\"{'': 1}\"", 2, "--dataset: '' is not the name of a dataset"),
    ("train.py tiny.py '--dataset={7: 1}'", 2, "--dataset: 7 is not the name of a dataset"),
    ("train.py tiny.py --dataset=\"{'chars': -1}\"", 2,
     "--dataset: the weight of chars is -1, not a number of at least 0"),
    ("train.py tiny.py --dataset=\"{'chars': 'much'}\"", 2, "--dataset: the weight of chars is 'much'"),
    ("train.py tiny.py --dataset=\"{'chars': 1e999}\"", 2, "--dataset: the weight of chars is inf"),
    ("train.py tiny.py --dataset=\"{'chars': .12345678, 'bytes': 1}\"", 2,
     "--dataset: .* only after .*round"),
    ("train.py tiny.py --dataset=\"{'chars': .5, 'char': .5}\"", 2,
     r"dataset 'char' does not exist: .*did you mean chars"),
    ("train.py tiny.py --dataset=\"{'chars': 1, 'bytes': 1}\"", 2,
     r"datasets 'bytes' \(byte\) and 'chars' \(char\) have"),
    ("train.py tiny.py --dataset_schedule=often", 2, "--dataset_schedule: 'often' is str, not list"),
    ("train.py --dataset_schedule=[]", 2, r"--dataset_schedule: .*the phases begin at steps \[\]: the first must be 0"),
    ("train.py --dataset_schedule=[3]", 2, r"--dataset_schedule: .*3 is not a phase: \(step, \{name: weight"),
    ("train.py --dataset_schedule=\"[(5, 'chars')]\"", 2, r"--dataset_schedule: .*steps \[5\]: the first must be 0"),
    ("train.py --dataset_schedule=\"[(0, 'a'), (0, 'b')]\"", 2,
     r"--dataset_schedule: .*steps \[0, 0\]: .* the rest increasing"),
    ("train.py tiny.py --dataset_schedule=\"[(0, 'chars')]\"", 2,
     "tiny.py: dataset: is incompatible with dataset_schedule"),
    ("train.py tiny.py --max_epochs=0", 2, "--max_epochs: 0.0 is not a number above 0"),
    ("train.py tiny.py --max_epochs=\"{'chars': 'two'}\"", 2,
     "--max_epochs: 'two' is not a number above 0"),
    ("train.py tiny.py --max_epochs=\"{'char': 2}\"", 2, r"--max_epochs: .*char is not among the sources \(chars\)"),
    ("train.py tiny.py --max_epochs=0.01", 2, "--max_epochs: chars would be read .*max_iters at most 0"),
    ("train.py tiny.py --packing=document", 2,
     r"--packing: 'document' is unknown \(did you mean documents\?\)"),
    ("train.py tiny.py --packing=documents", 2, "packing='documents' needs an end-of-text token .*'chars'"),
    ("train.py tiny.py --tokenizer=byt", 2, "tokenizer 'byt' is unknown .*did you mean byte"),
    ("train.py tiny.py --tokenizer=byte", 2, "dataset 'chars' was made with the tokenizer char, not with byte"),
    ("train.py --resume=must --run_name=good --packing=documents", 2,
     "--packing: the run was made with 'str"),
    # bare token files
    ("train.py tiny.py --dataset=bare", 2,
     "data/bare: has train.bin and val.bin and no meta.json: .*--tokenizer=gpt2 or"),
    ("train.py tiny.py --dataset=bare --vocab_size=9", 2,
     "data/bare/train.bin: has the token id 10, beyond vocab_size=9"),
    ("train.py tiny.py --dataset=bare --vocab_size=99999", 2, "data/bare/train.bin: has 4402 bytes, .*whole .* uint32"),
    ("train.py tiny.py --dataset=bare --tokenizer=none.model", 2, "tokenizer none.model: cannot be read: No such file"),
    # sample.py
    ("$ sample.py", 2, ".*required: --run"),
    ("sample.py --runs=runs/good", 2, r".*required: --run|.*--runs=runs/good \(did you mean --run\?\)"),
    ("sample.py --run=runs/good --top=3", 2, r".*--top=3 \(did you mean --top_[kp]\?\)"),
    ("sample.py --run=runs/none", 2, "--run: runs/none is not a run directory"),
    ("sample.py --run=tiny.py", 2, "--run: tiny.py is not a run directory"),
    ("sample.py --run=runs/good --temperature=-1", 2, "--temperature: -1.0 is out of range, must be 0"),
    ("sample.py --run=runs/good --temperature=nan", 2, "--temperature: nan is out of range"),
    ("sample.py --run=runs/good --top_k=0", 2, "--top_k: 0 is out of range, must be at least 1"),
    ("sample.py --run=runs/good --top_p=2", 2, r"--top_p: 2.0 is out of range, must be in \(0, 1\]"),
    ("sample.py --run=runs/good --num_samples=0", 2, "--num_samples: 0 is out of range, must be at least 1"),
    ("sample.py --run=runs/good --num_samples=few", 2, "--num_samples: invalid int value: 'few'"),
    ("sample.py --run=runs/good --max_new_tokens=-1", 2, "--max_new_tokens: -1 is out of range, must be at least 0"),
    ("sample.py --run=runs/good --checkpoint=last", 2, "--checkpoint: invalid choice: 'last' .*'latest'"),
    ("sample.py --run=runs/good --device=gpu", 2, "(--)?device: 'gpu' is unknown .*cuda"),
    ("sample.py --run=runs/good --device=cpu --prompt=''", 2, "--prompt: is empty"),
    ("sample.py --run=runs/good --device=cpu --prompt='a?'", 2, "--prompt: .*'\\?' is not among the 11"),
    ("sample.py --run=runs/hollow --device=cpu", 3, "runs/hollow has no usable checkpoint"),
    ("sample.py --run=runs/damaged --device=cpu", 3, "runs/damaged"),
    # compare_architectures.py
    ("$ compare_architectures.py --out_dir=nowhere", 2, "no such directory: nowhere .*python /.*/train.py /.*/config/"),
    ("compare_architectures.py --out_dir=data/chars", 2, "no runs in data/chars .*python /.*/train.py /.*/config/"),
    ("compare_architectures.py runs/none", 2, "no such run directory: runs/none"),
    ("compare_architectures.py 'runs/none*'", 2, r"no such run directory: runs/none\*"),
    ("compare_architectures.py --sort=loss", 2, r"--sort: 'loss' is unknown \(did you mean val_loss\?\)"),
    ("compare_architectures.py --format=xml", 2, "--format: invalid choice: 'xml' .*'json'"),
    ("compare_architectures.py --latest=0", 2, "--latest: 0 is out of range, must be at least 1"),
    ("compare_architectures.py --latest=all", 2, "--latest: invalid int value: 'all'"),
    ("compare_architectures.py --lates=3", 2, r".*--lates=3 \(did you mean --latest\?\)"),
    # prepare.py
    ("$ data/shakespeare_char/prepare.py --out_dir=x --source=none", 2, "--source none: cannot be read: No such file"),
    ("data/shakespeare_char/prepare.py --out_dir=x --source=data", 2, "--source data: cannot be read: Is a directory"),
    ("data/shakespeare_char/prepare.py --out_dir=x --source=latin1.py", 2, "--source latin1.py: is not UTF-8 text"),
    ("data/shakespeare_char/prepare.py --out_dir=data --source=blank", 2, "data: the train split would be empty"),
    ("data/shakespeare_char/prepare.py --out_dir=tiny.py --source=tiny.py", 2, "tiny.py: cannot be written: "),
    ("data/files/prepare.py --name=x", 2, ".*required: --input"),
    ("data/files/prepare.py --name=a/b --input=tiny.py", 2, "--name: 'a/b' is not the name of a folder"),
    ("data/files/prepare.py --name=pycode --input=tiny.py", 2, "--name: pycode is a dataset of the project"),
    ("$ data/files/prepare.py --name=x --input 'none/*.txt'", 2, r"none/\*\.txt: no such file"),
    ("data/files/prepare.py --name=x --input=tiny.py --tokenizer=gpt", 2,
     r"tokenizer 'gpt' is unknown \(did you mean gpt2"),
    ("data/files/prepare.py --name=x --input=tiny.py --val_fraction=0", 2,
     "--val_fraction: 0.0 is out of range, must be"),
    ("data/files/prepare.py --name=x --input=tiny.py --workers=0", 2,
     "--workers: 0 is out of range, must be at least 1"),
    ("data/files/prepare.py --name=x --input=tiny.py --filter=min=3", 2, "--filter 'min=3': no such filter"),
    ("data/files/prepare.py --name=x --input=blank --out_dir=data --tokenizer=byte", 2,
     "data: the train .*left out: 1 empty"),
    ("data/files/prepare.py --name=x --input=latin1.py --out_dir=data --tokenizer=byte", 2,
     r"text files: 1 of 1 records are lost, the first \(not_utf8\) is latin1.py: byte 11"),
    ("data/files/prepare.py --name=x --input=tiny.py --out_dir=data --tokenizer=byte", 2,
     "data: the val split would be empty"),
    ("data/files/prepare.py --name=x --input=tiny.py --out_dir=blank --tokenizer=byte", 2,
     "blank: cannot be written: File"),
    ("data/shakespeare/prepare.py --source=none --tokenizer=byte", 2, "--source none: cannot be read: No such file"),
    ("data/fineweb/prepare.py --sample=1BT", 2, "--sample: invalid choice: '1BT'"),
    # tools
    ("tools/train_tokenizer.py --input=tiny.py --vocab_size=5", 2, "--vocab_size: 5 is out of range, must be from 300"),
    ("tools/train_tokenizer.py --input=tiny.py", 2, "--vocab_size 8192: SentencePiece cannot train on this text"),
    ("tools/inspect_data.py char --data_dir=data", 2, "dataset 'char' does not exist: .*did you mean chars"),
    ("tools/inspect_data.py chars --data_dir=data --top=-1", 2, "--top: -1 is out of range, must be at least 0"),
    ("tools/inspect_data.py chars --data_dir=data --block_size=9999", 2,
     "block_size=9999 is too long for the train split"),
    ("tools/analyze_mixture.py tiny.py --dataset=none", 2, "dataset 'none' does not exist"),
    ("tools/convert_nanogpt_meta.py data/chars", 2, "data/chars: is no folder with train.bin and val.bin and without"),
    ("tools/convert_nanogpt_meta.py data/bare", 2, r"data/bare/meta.pkl: cannot be read: .*\(give --tokenizer\)"),
    ("data/pycode/prepare.py --outdir=x", 2, r".*--outdir=x \(did you mean --out_dir\?\)"),
    *((f"train.py {name}.py", 2, rf"{name}\.py: {line}") for name, (_, line) in CONFIG_FILES.items()),
    *((f"train.py tiny.py --dataset={name}", 2, f"data/{name}/meta.json.*{line}") for name, (_, line) in META.items()),
    *((f"train.py --resume=must --run_name={name}", 2, line) for name, (_, line) in RUN_JSON.items()),
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rewrite_meta(directory, change):
    meta = json.loads((directory / "meta.json").read_text())
    change(meta)
    (directory / "meta.json").write_text(json.dumps(meta))


def put_token_beyond_the_vocabulary(directory):
    """A token id too large, in a file that is otherwise what meta.json says."""
    content = b"\x0b\0" + (directory / "train.bin").read_bytes()[2:]
    (directory / "train.bin").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite_meta(directory, lambda meta: meta["splits"]["train"]["files"]["train.bin"].update(sha256=digest))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with everything that the commands name. No command changes it, so they all use it."""
    workspace = tmp_path_factory.mktemp("workspace")
    write(workspace / "tiny.py", TINY)
    write(workspace / "blank", "")
    (workspace / "folder.py").mkdir()
    for name, (content, _) in CONFIG_FILES.items():
        write(workspace / f"{name}.py", content)

    data, chars = workspace / "data", workspace / "data" / "chars"
    characters = CharTokenizer("abcdefgh \n.")
    write_dataset(chars, characters, [("train", "abc def gh\n" * 200), ("val", "a.b.\n" * 40)], source="a test",
                  separate=False)
    write_dataset(data / "bytes", ByteTokenizer(), [("train", "abc" * 100), ("val", "abc" * 100)], source="a test")
    write_dataset(workspace / "other/chars", characters, [("train", "hg " * 200), ("val", "abc" * 100)],
                  source="a test", separate=False)
    train = (chars / "train.bin").read_bytes()
    for name in ("truncated", "padded", "flipped", "beyond", "lost", "meta_text", "meta_folder", *META):
        shutil.copytree(chars, data / name)
    write(data / "truncated/train.bin", train[:-2])
    write(data / "padded/train.bin", train + b"\0\0")
    write(data / "flipped/val.bin", b"\1" + (chars / "val.bin").read_bytes()[1:])
    put_token_beyond_the_vocabulary(data / "beyond")
    (data / "lost/val.bin").unlink()
    write(data / "meta_text/meta.json", "{")
    (data / "meta_folder/meta.json").unlink()
    (data / "meta_folder/meta.json").mkdir()
    (data / "bare").mkdir()
    for name in ("train", "val"):
        write(data / f"bare/{name}.bin", train + b"\1\0")
    for name, (change, _) in META.items():
        rewrite_meta(data / name, change)

    done = run_python(ROOT / "train.py", "tiny.py", "--run_name=good", cwd=workspace)
    assert done.returncode == 0, done.stderr
    runs = workspace / "runs"
    for name in ("hollow", "damaged"):
        shutil.copytree(runs / "good", runs / name)
    shutil.rmtree(runs / "hollow/checkpoints")
    (runs / "hollow/config.json").unlink()
    (runs / "hollow/model.safetensors").unlink()
    for weights in (runs / "damaged").rglob("model*.safetensors"):
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    write(runs / "file", "")
    for name, (content, _) in RUN_JSON.items():
        write(runs / name / "run.json", content)
    return workspace


def tree(directory):
    """{path: content, None for a folder} of everything under a directory."""
    return {p: None if p.is_dir() else p.read_bytes() for p in directory.rglob("*") if p.name != ".lock"}


@pytest.fixture
def run(workspace, monkeypatch, capsys):
    """run(command) -> (exit code, stdout, stderr) of the command in the workspace."""
    def run(command):
        separate, command = command.startswith("$ "), command.removeprefix("$ ")
        words = shlex.split(command)
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        environment = dict(word.split("=") for word in words[:script])
        arguments = [str(ROOT / words[script]), *words[script + 1:]]
        if separate:
            done = run_python(*arguments, cwd=workspace, env={"OMP_NUM_THREADS": "1", **environment})
            return done.returncode, done.stdout, done.stderr
        monkeypatch.chdir(workspace)
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(sys, "path", sys.path[:])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            runpy.run_path(arguments[0], run_name="__main__")
        return left.value.code, *capsys.readouterr()
    return run


def row_marks(command):
    """Commands that load torch in a new process are slow."""
    return [pytest.mark.slow] if command.startswith("$") and "tiny.py" in command else []


@pytest.mark.grid(5)
@pytest.mark.parametrize("command, code, line", [pytest.param(*row, id=row[0][:60].replace(os.sep, ":"),
                                                              marks=row_marks(row[0])) for row in COMMANDS])
def test_a_bad_input_ends_in_one_line_and_changes_nothing(workspace, run, command, code, line):
    before = tree(workspace)
    exit_code, out, err = run(command)
    *warnings, error = err.splitlines()
    assert re.match(f"error: {line}", error), error
    assert exit_code == code
    assert all(warning.startswith("warning: ") for warning in warnings), err
    assert "Traceback" not in out + err
    assert tree(workspace) == before
