"""Times nanoGPT's CPU recipe with nanoGPT and with blockGPT in turn: wall time, validation loss, and the time ratio.

    git clone https://github.com/karpathy/nanoGPT
    python data/shakespeare_char/prepare.py && python nanoGPT/data/shakespeare_char/prepare.py
    python -m tools.bench_nanogpt_cpu --nanogpt nanoGPT --pairs 3

The speed of a computer drifts, so the two run in pairs, and the number to quote is the median ratio.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser, check_ranges
from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.files import is_file, user_path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
          "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
          "--dropout=0.0")


def time_training(command: Sequence[str], cwd: Path, loss_pattern: str) -> tuple[float, float]:
    """(wall seconds of the whole process, the last validation loss that it printed).

    Args:
        command: what follows `python`.
        cwd: the directory to run it in.
        loss_pattern: a regular expression with one group, the loss.
    """
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    losses = re.findall(loss_pattern, done.stdout)
    if done.returncode or not losses:
        reason = (done.stderr.strip().splitlines() or ["no validation loss was printed"])[-1]
        raise UserError(f"{cwd}: {' '.join(command[:2])} failed: {reason}")
    return seconds, float(losses[-1])


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(description="Compare the time of nanoGPT's CPU recipe with nanoGPT and with blockGPT.")
    parser.add_argument("--nanogpt", type=user_path, required=True, help="a nanoGPT checkout with its data prepared")
    parser.add_argument("--pairs", type=int, default=3, help="how often each is run")
    args = parser.parse_args(argv)
    if not is_file(args.nanogpt / "data/shakespeare_char/train.bin"):
        raise UserError(f"--nanogpt: {args.nanogpt}/data/shakespeare_char/train.bin does not exist (run python "
                        f"{args.nanogpt}/data/shakespeare_char/prepare.py)")
    check_ranges(args, {"pairs": (args.pairs >= 1, "at least 1")})
    ratios = []
    for i in range(args.pairs):
        nanogpt_seconds, nanogpt_loss = time_training(["train.py", *RECIPE.split()], args.nanogpt,
                                                      r"val loss ([\d.]+)")
        with tempfile.TemporaryDirectory() as out_dir:
            command = ["train.py", "config/bench_nanogpt_cpu.py", f"--out_dir={out_dir}", "--run_name=bench"]
            seconds, loss = time_training(command, ROOT, r"val_loss ([\d.]+)")
        ratios.append(seconds / nanogpt_seconds)
        print(f"pair {i + 1}: nanoGPT {nanogpt_seconds:.1f} s, loss {nanogpt_loss:.4f} (20 random batches)   "
              f"blockGPT {seconds:.1f} s, loss {loss:.4f} (the whole split)   ratio {ratios[-1]:.3f}", flush=True)
    print(f"blockGPT / nanoGPT, wall time: median {statistics.median(ratios):.3f}, "
          f"min {min(ratios):.3f}, max {max(ratios):.3f}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
