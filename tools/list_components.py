"""The option space as a table: every option, its description, and its cost on this machine relative to the default.

    python -m tools.list_components                  # parameters, FLOPs, memory and step time
    python -m tools.list_components --steps=0        # without timing, in seconds

Steps (forward, backward, AdamW) of an option and of its baseline alternate, and the ratio is of their medians, so that
a machine whose speed drifts slows both. A key that only one option reads is compared with that option.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
import torch

from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.memory import MemoryAccount
from blockgpt.console import ArgumentParser, check_ranges
from blockgpt.errors import exit_on_user_error
from blockgpt.training.device import choose_device
from model_builder import build_model
from model_config import AXES, ModelConfig, example_values, format_label


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The parsed command line; `UserError` for a value out of range."""
    parser = ArgumentParser(description="The option space, and the cost of each option here.")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each option; 0: no timing")
    parser.add_argument("--n_layer", type=int, default=4, help="blocks")
    parser.add_argument("--n_embd", type=int, default=256, help="width")
    parser.add_argument("--n_head", type=int, default=4, help="heads")
    parser.add_argument("--block_size", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences of a step")
    parser.add_argument("--vocab_size", type=int, default=320, help="rows of the embedding")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(argv)
    check_ranges(args, {"steps": (args.steps >= 0, "at least 0"), "batch_size": (args.batch_size >= 1, "at least 1")})
    return args


def required_options(key: str) -> dict[str, Any]:
    """{axis: option} without which `key` would have no effect on a default model."""
    if key not in ModelConfig().unused_keys():
        return {}
    return {axis: name for axis, table in AXES.items() for name, option in table.items() if key in option.keys}


class StepTimer:
    """A model and its optimizer, trained one step at a time on random tokens."""

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device) -> None:
        self.model = build_model(config, device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        shape = (batch_size, config.block_size)
        self.idx = torch.randint(0, config.vocab_size, shape, device=device)
        self.documents = (self.idx == 0).cumsum(dim=1)

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        loss: torch.Tensor = self.model(self.idx, self.idx, self.documents)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.idx.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def step_ratio(config: ModelConfig, baseline: ModelConfig, steps: int, batch_size: int,
               device: torch.device) -> float | None:
    """Step time of `config` over that of `baseline`; None without steps, or if this device cannot train it."""
    trains_on = config.options()["attention_backend"].trains_on
    if not steps or (trains_on and device.type not in trains_on):
        return None
    timers = [StepTimer(c, batch_size, device) for c in (config, baseline)]
    seconds = [[t.step() for t in timers] for _ in range(steps + 2)][2:]  # two for warm-up
    return statistics.median(s[0] for s in seconds) / statistics.median(s[1] for s in seconds)


@functools.cache
def costs(config: ModelConfig) -> tuple[int, float, float]:
    """(parameters, training FLOPs per token, bytes saved for the backward pass per token), without allocating."""
    memory = MemoryAccount(build_model, config, torch.float32, gpu=True)
    parameters = sum(p.numel() for p in memory.model.parameters())
    return (parameters, flops_per_token(memory.model, config.block_size)["train"],
            memory.saved_in().per_sequence / config.block_size)


def values_to_list(args: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """{key: its values}: every option of each axis, then the example of every other key that is no flag here."""
    others = {key: values[1:] for key, values in example_values().items() if key not in AXES and key != "arch_preset"
              and not hasattr(args, key)}
    return {**{axis: tuple(table) for axis, table in AXES.items()}, **others}


def label_and_help(key: str, value: Any) -> tuple[str, str]:
    """(what `value` adds to the architecture's name, its line of help)."""
    if key in AXES:
        return AXES[key][value].label, AXES[key][value].help
    metadata = next(f.metadata for f in dataclasses.fields(ModelConfig) if f.name == key)
    label = metadata["label"]
    return format_label(label, value) if label else "", metadata["help"].partition(";")[0]


def print_row(key: str, value: Any, args: argparse.Namespace, baseline: ModelConfig, device: torch.device) -> None:
    """Measure and print one row; nothing for a value without effect on the baseline."""
    config = dataclasses.replace(baseline, **{key: value})
    if key in config.unused_keys():
        return
    label, text = label_and_help(key, value)
    if getattr(baseline.resolve(), key) == value:
        print(f"{key:19} {value!s:17} {label:12} {'·':>11} {'·':>6} {'·':>6} {'·':>6}  {text}")
        return
    (parameters, flops, saved), (usual_parameters, usual_flops, usual_saved) = costs(config), costs(baseline)
    ratio = step_ratio(config, baseline, args.steps, args.batch_size, device)
    print(f"{key:19} {value!s:17} {label:12} {parameters - usual_parameters:>+11,} {flops / usual_flops:>6.2f} "
          f"{saved / usual_saved:>6.2f} {'–' if ratio is None else f'{ratio:.2f}':>6}  {text}", flush=True)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    device = choose_device(args.device, local_rank=0)
    base = ModelConfig(n_layer=args.n_layer, n_embd=args.n_embd, n_head=args.n_head, block_size=args.block_size,
                       vocab_size=args.vocab_size)
    hardware = {"cpu": f"{torch.get_num_threads()} CPU threads", "mps": "MPS"}
    timed_on = "not timed" if not args.steps else hardware.get(device.type) or torch.cuda.get_device_name()
    print(f"Compared with {base.arch_name()}, block {args.block_size}, batch {args.batch_size}, {timed_on}. "
          f"It has {costs(base)[0]:,} parameters.\n")
    print(f"{'key':19} {'value':17} {'in the name':12} {'parameters':>11} {'FLOPs':>6} {'saved':>6} {'step':>6}  "
          "description")
    for key, values in values_to_list(args).items():
        for value in values:
            print_row(key, value, args, dataclasses.replace(base, **required_options(key)), device)
    print("\n· is the option that the others of its key are compared with; – is not timed. FLOPs: of training, by the "
          "PaLM\nconvention. saved: bytes for the backward pass per token, on a GPU, in float32. step: time of a "
          "training step.")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
