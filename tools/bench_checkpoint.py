"""What a checkpoint costs: seconds per GB, by the clock, to save, to hold training up in the background, verify, load.

    python -m tools.bench_checkpoint [config/*.py ...] [--key=value ...] [--folder DIR] [--repeat 3]

One process, the model of the config (by default GPT-2's 124M parameters: 1.5 GB) with AdamW's moments drawn at random,
on the disk of --folder. Beside it `torch.save` of the same tensors, forced to the disk.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from blockgpt.console import ArgumentParser
from blockgpt.errors import exit_on_user_error
from blockgpt.files import fsync_path
from configurator import load_config

GPT2 = ["config/arch_gpt2.py", "--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=1024"]


def trained(config):
    """A model and its optimizer, as after a step."""
    import torch

    from blockgpt.training.optimizers import build_optimizer
    from model_builder import build_model

    device = torch.device("cpu")
    model = build_model(config.for_vocabulary(50304).model, config.seed, device)
    optimizer = build_optimizer(model, config, device)
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.ones(()), "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
    return model, optimizer


def main(argv):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="on the disk in question; by default that of temporary files")
    parser.add_argument("--repeat", type=int, default=3)
    args, keys = parser.parse_known_args(argv)
    config = load_config([*(keys or GPT2), "--device=cpu"])
    import torch

    import blockgpt.training.checkpoint as checkpoint
    from blockgpt.training.checkpoint_saver import CheckpointSaver

    model, optimizer = trained(config)
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    gigabytes = sum(t.nbytes for t in tensors) / 1e9
    seconds = {}

    def timed(name, action):
        os.sync()  # what was written before is not this one's
        started = time.perf_counter()
        result = action()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        plain = Path(folder, "plain.pt")
        waiting = CheckpointSaver(tempfile.mkdtemp(dir=folder))
        background = CheckpointSaver(tempfile.mkdtemp(dir=folder), asynchronous=True)
        for step in range(1, args.repeat + 1):
            state = {"step": step, "tokens": 0, "best": None}
            path = timed("save", lambda state=state: waiting.save(model, optimizer, state))
            timed("verify", lambda path=path: checkpoint.verify(path))
            timed("load, once verified", lambda path=path: checkpoint.load(path, model, optimizer))
            timed("checkpoint_async holds training up", lambda state=state: background.save(model, optimizer, state))
            background.wait()
            timed("torch.save and fsync", lambda: (torch.save(tensors, plain), fsync_path(plain)))
    print(f"{gigabytes:.2f} GB; seconds per GB, least and most of {args.repeat}:")
    for name, values in seconds.items():
        print(f"  {name}: {min(values) / gigabytes:.2f} to {max(values) / gigabytes:.2f}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
