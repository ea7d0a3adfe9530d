"""Measure checkpoints: wall-clock seconds per GB to save, to verify, to load, and that an asynchronous save blocks.

    python -m tools.bench_checkpoint [config/*.py ...] [--key=value ...] [--folder DIR] [--repeat 3]

One process and the model of the config (by default GPT-2's 124M parameters: 1.5 GB) with random AdamW state, on the
disk of --folder. For comparison, `torch.save` of the same tensors with an fsync.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser
from blockgpt.errors import exit_on_user_error
from blockgpt.files import fsync_path
from configurator import Config, load_config

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

GPT2 = ["config/arch_gpt2.py", "--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=1024"]


def model_and_optimizer(config: Config) -> "tuple[torch.nn.Module, torch.optim.Optimizer]":
    """The model of the config, and its optimizer with random state."""
    import torch

    from blockgpt.training.optimizers import build_optimizer
    from model_builder import build_model

    device = torch.device("cpu")
    model = build_model(config.for_vocabulary(50304).model, config.seed, device)
    optimizer = build_optimizer(model, config, device)
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.ones(()), "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
    return model, optimizer


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=os.path.expanduser,
                        help="a folder on the disk to measure; default: that of temporary files")
    parser.add_argument("--repeat", type=int, default=3)
    args, keys = parser.parse_known_args(argv)
    config = load_config([*(keys or GPT2), "--device=cpu"])
    import torch

    from blockgpt.checkpoints import checkpoint
    from blockgpt.checkpoints.saver import CheckpointSaver

    model, optimizer = model_and_optimizer(config)
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    gigabytes = sum(t.nbytes for t in tensors) / 1e9
    seconds: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], Result]) -> Result:
        os.sync()  # earlier writes do not count
        started = time.perf_counter()
        result = action()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        plain = Path(folder, "plain.pt")

        def save_plain() -> None:
            torch.save(tensors, plain)
            fsync_path(plain)

        saver = CheckpointSaver(tempfile.mkdtemp(dir=folder))
        background = CheckpointSaver(tempfile.mkdtemp(dir=folder), asynchronous=True)
        for step in range(1, args.repeat + 1):
            state = {"step": step, "tokens": 0, "best": None}
            path = timed("save", partial(saver.save, model, optimizer, state))
            assert path is not None
            timed("verify", partial(checkpoint.verify, path))
            timed("load, verified before", partial(checkpoint.load, path, model, optimizer))
            timed("checkpoint_async blocks training", partial(background.save, model, optimizer, state))
            background.wait()
            timed("torch.save and fsync", save_plain)
    print(f"{gigabytes:.2f} GB; seconds per GB, minimum and maximum of {args.repeat}:")
    for name, values in seconds.items():
        print(f"  {name}: {min(values) / gigabytes:.2f} to {max(values) / gigabytes:.2f}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
