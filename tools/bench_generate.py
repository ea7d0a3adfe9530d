"""Generation with and without the KV cache: seconds for the same tokens, and their ratio.

    python -m tools.bench_generate config/arch_llama.py --n_layer=6 --n_embd=384 --n_head=6 --block_size=512

It accepts every key of train.py. Greedy decoding after a prompt of 16 tokens, both ways in turn, three times.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
import torch

from blockgpt.console import ArgumentParser
from blockgpt.errors import exit_on_user_error
from blockgpt.training.device import choose_device
from configurator import load_config
from model_builder import build_model


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                            usage="%(prog)s [FILE.py …] [--key=value …] [--new_tokens=N]",
                            epilog="The other arguments are those of train.py (python train.py --help).")
    parser.add_argument("--new_tokens", type=int, default=256, help="tokens to generate")
    args, config_args = parser.parse_known_args(argv)
    config = load_config(config_args)
    device = choose_device(config.device, local_rank=0)
    model = build_model(config.model, config.seed, device).eval()
    prompt = torch.randint(0, config.model.vocab_size, (1, 16), device=device)

    def seconds(use_cache: bool) -> float:
        started = time.perf_counter()
        model.generate(prompt, args.new_tokens, temperature=0, use_cache=use_cache)
        return time.perf_counter() - started

    seconds(True)  # warm-up
    pairs = [(seconds(True), seconds(False)) for _ in range(3)]
    with_cache, without = (statistics.median(p[i] for p in pairs) for i in range(2))
    name = model.infer_config().arch_name()
    print(f"{name}, block {config.model.block_size}, {args.new_tokens} new tokens on {device}: "
          f"{with_cache:.2f} s with the cache, {without:.2f} s without: {without / with_cache:.1f} times faster "
          f"(pairs: {', '.join(f'{b / a:.1f}' for a, b in pairs)})")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
