"""Generation with the KV cache and without: seconds for the same tokens, and their ratio.

    python -m tools.bench_generate config/arch_llama.py --n_layer=6 --n_embd=384 --n_head=6 --block_size=512

Any keys of train.py; --new_tokens=N tokens (256) after a prompt of 16, greedy, each way in turn, three times.
"""

import statistics
import sys
import time

import torch

from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.training.device import choose_device
from configurator import load_config
from model_builder import build_model


def main(argv):
    new_tokens = 256
    for argument in [a for a in argv if a.startswith("--new_tokens=")]:
        argv.remove(argument)
        if not argument.removeprefix("--new_tokens=").isdecimal():
            raise UserError(f"{argument}: is not a whole number")
        new_tokens = int(argument.removeprefix("--new_tokens="))
    config = load_config(argv)
    device = choose_device(config.device, local_rank=0)
    model = build_model(config.model, config.seed, device).eval()
    prompt = torch.randint(0, config.model.vocab_size, (1, 16), device=device)

    def seconds(use_cache):
        started = time.perf_counter()
        model.generate(prompt, new_tokens, temperature=0, use_cache=use_cache)
        return time.perf_counter() - started

    seconds(True)  # warms up
    pairs = [(seconds(True), seconds(False)) for _ in range(3)]
    with_cache, without = (statistics.median(p[i] for p in pairs) for i in range(2))
    print(f"{model.infer_config().arch_name()}, block {config.model.block_size}, {new_tokens} new tokens on {device}: "
          f"{with_cache:.2f} s with the cache, {without:.2f} s without: {without / with_cache:.1f} times faster "
          f"(pairs: {', '.join(f'{b / a:.1f}' for a, b in pairs)})")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
