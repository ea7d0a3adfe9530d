"""nanoGPT's CPU recipe, nanoGPT and ours in turn on the same machine: wall time, validation loss, their ratio.

    git clone https://github.com/karpathy/nanoGPT
    python data/shakespeare_char/prepare.py && python nanoGPT/data/shakespeare_char/prepare.py
    python -m tools.bench_nanogpt_cpu --nanogpt nanoGPT --pairs 3

Machines drift, so the two run in pairs and the figure to quote is the median ratio.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from blockgpt.console import ArgumentParser
from blockgpt.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
          "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
          "--dropout=0.0")


def timed(command, cwd, loss_pattern):
    """(wall seconds of the whole process, the last validation loss that it printed)."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"{cwd}: {' '.join(command[:2])} failed: {done.stderr.strip().splitlines()[-1:]}")
    return seconds, float(re.findall(loss_pattern, done.stdout)[-1])


def main(argv):
    parser = ArgumentParser(description="time nanoGPT's CPU recipe against ours")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a nanoGPT checkout with its data prepared")
    parser.add_argument("--pairs", type=int, default=3, help="how often each is run")
    args = parser.parse_args(argv)
    if not (args.nanogpt / "data/shakespeare_char/train.bin").is_file():
        raise UserError(f"--nanogpt: {args.nanogpt}/data/shakespeare_char/train.bin is not there (see --help)")
    ratios = []
    for i in range(args.pairs):
        theirs, their_loss = timed(["train.py", *RECIPE.split()], args.nanogpt, r"val loss ([\d.]+)")
        with tempfile.TemporaryDirectory() as out_dir:
            command = ["train.py", "config/bench_nanogpt_cpu.py", f"--out_dir={out_dir}", "--run_name=bench"]
            ours, our_loss = timed(command, ROOT, r"val_loss ([\d.]+)")
        ratios.append(ours / theirs)
        print(f"pair {i + 1}: nanoGPT {theirs:.1f} s, loss {their_loss:.4f} (20 random batches)   "
              f"blockGPT {ours:.1f} s, loss {our_loss:.4f} (the whole split)   ratio {ratios[-1]:.3f}", flush=True)
    print(f"blockGPT / nanoGPT, wall time: median {statistics.median(ratios):.3f}, "
          f"min {min(ratios):.3f}, max {max(ratios):.3f}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
