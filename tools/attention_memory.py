"""The attention backends by request: the memory that each saves for the backward pass of one sequence on a GPU.

    python -m tools.attention_memory config/arch_gemma2.py --block_size=4096

It accepts every key of train.py. The bytes are computed by the memory account, not measured, so no GPU is needed.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
import torch

from blockgpt.accounting.memory import MemoryAccount
from blockgpt.console import ArgumentParser
from blockgpt.errors import exit_on_user_error
from configurator import load_config
from model_builder import build_model
from model_config import ATTENTION_BACKEND, ModelConfig

DTYPES = ("float32", "bfloat16")


def requests(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """{name: the keys that make the request}; each is alone, but for the last."""
    plain: dict[str, Any] = dict(attn_softcap=None, sliding_window=None, mask_documents=False, dropout=0.0,
                                 position_encoding="rope", attention_backend="auto")
    softcap = config.attn_softcap or 50.0
    return {"causal": plain, "window": {**plain, "sliding_window": max(1, config.block_size // 4)},
            "documents": {**plain, "mask_documents": True}, "ALiBi": {**plain, "position_encoding": "alibi"},
            "softcap": {**plain, "attn_softcap": softcap},
            "softcap, dropout": {**plain, "attn_softcap": softcap, "dropout": 0.1}}


def saved_by_attention(config: ModelConfig, dtype: str) -> float:
    """GiB that the attention modules save for the backward pass of one sequence on a GPU."""
    account = MemoryAccount(build_model, config, getattr(torch, dtype), gpu=True)
    return account.saved_by_category()["attention"](1) / 2**30


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                            usage="%(prog)s [FILE.py …] [--key=value …]",
                            epilog="The arguments are those of train.py (python train.py --help).")
    config = load_config(parser.parse_known_args(argv)[1]).model
    print(f"GiB that attention saves for one sequence of {config.block_size}, of {config.n_layer} layers with "
          f"{config.n_head} heads; {' / '.join(DTYPES)}\n")
    print(f"{'request':18}" + "".join(f"{name:>16}" for name in ATTENTION_BACKEND) + "   auto on CUDA, on a CPU")
    for name, keys in requests(config).items():
        requested = dataclasses.replace(config, **keys)
        cells = []
        for backend in ATTENTION_BACKEND:
            if backend not in requested.supported_backends():
                cells.append("–")
                continue
            chosen = dataclasses.replace(requested, attention_backend=backend)
            cells.append(" / ".join(f"{saved_by_attention(chosen, dtype):.2f}" for dtype in DTYPES))
        auto = ", ".join(requested.auto_backend(device) for device in ("cuda", "cpu"))
        print(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells) + f"   {auto}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
