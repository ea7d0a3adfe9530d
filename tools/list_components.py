"""The option space as a table: every option, what it is, what it costs here beside the option it would replace.

    python -m tools.list_components                  # parameters, FLOPs, memory and step time, beside the defaults
    python -m tools.list_components --steps=0        # without the measuring, in seconds

Steps (forward, backward, AdamW) of an option and of its baseline are taken in turn and the ratio is of their medians,
so that a machine that drifts slows both. An option that only another one reads is measured beside that one.
"""

import dataclasses
import statistics
import sys
import time

import torch

from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.memory import MemoryAccount
from blockgpt.console import ArgumentParser
from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.training.device import choose_device
from model_builder import build_model
from model_config import AXES, ModelConfig

# Keys that are no axis, each with a value to show.
VALUES = {"n_kv_head": 1, "head_dim": 128, "bias": True, "qkv_bias": True, "weight_tying": False, "rope_fraction": 0.5,
          "attn_softcap": 50.0, "logit_softcap": 30.0, "sliding_window": 32, "mask_documents": True,
          "embedding_scale": "sqrt", "embedding_norm": True, "residual_scale": 0.5, "x0_mix": True,
          "value_embeddings": 1, "zero_init_residual": True, "dropout": 0.1}


def arguments(argv):
    parser = ArgumentParser(description="the option space, and what each option costs here")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each option; 0: none")
    parser.add_argument("--n_layer", type=int, default=4, help="blocks")
    parser.add_argument("--n_embd", type=int, default=256, help="width")
    parser.add_argument("--n_head", type=int, default=4, help="heads")
    parser.add_argument("--block_size", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences of a step")
    parser.add_argument("--vocab_size", type=int, default=320, help="rows of the embedding")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(argv)
    for name, least in (("steps", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: {getattr(args, name)} is out of range, must be at least {least}")
    return args


def beside(key):
    """The options without which `key` would have no effect: {axis: option}."""
    return {axis: option for axis, table in AXES.items() for option, entry in table.items() if key in entry.keys
            and key in ModelConfig().unused_keys()}


class Trial:
    """A model with all it takes to train it, a step at a time."""

    def __init__(self, config, batch_size, device):
        self.model = build_model(config, device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        shape = (batch_size, config.block_size)
        self.idx = torch.randint(0, config.vocab_size, shape, device=device)
        self.documents = (self.idx == 0).cumsum(dim=1)

    def step(self):
        """Seconds of one step."""
        started = time.perf_counter()
        self.model(self.idx, self.idx, documents=self.documents)[1].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.idx.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def step_ratio(config, baseline, steps, batch_size, device):
    """Step time of `config` over that of `baseline`; None where this device cannot train it."""
    trains_on = config.options()["attention_backend"].trains_on
    if not steps or (trains_on and device.type not in trains_on):
        return None
    trials = [Trial(c, batch_size, device) for c in (config, baseline)]
    seconds = [[t.step() for t in trials] for _ in range(steps + 2)][2:]  # the first ones warm up
    return statistics.median(s[0] for s in seconds) / statistics.median(s[1] for s in seconds)


def account(config):
    """(parameters, training FLOPs per token, bytes saved for the backward pass per token) of a model not made."""
    memory = MemoryAccount(build_model, config, torch.float32, gpu=True)
    return (memory.model.parameter_counts()["total"], flops_per_token(memory.model, config.block_size)["train"],
            memory.saved_in().per_sequence / config.block_size)


def main(argv):
    args = arguments(argv)
    device = choose_device(args.device, local_rank=0)
    base = ModelConfig(n_layer=args.n_layer, n_embd=args.n_embd, n_head=args.n_head, block_size=args.block_size,
                       vocab_size=args.vocab_size)
    where = "not timed" if not args.steps else (f"{torch.get_num_threads()} CPU threads" if device.type == "cpu"
                                                else torch.cuda.get_device_name() if device.type == "cuda" else "MPS")
    print(f"Beside {base.arch_name()}, block {args.block_size}, batch {args.batch_size}, {where}. "
          f"It has {account(base)[0]:,} parameters.\n")
    print(f"{'key':19} {'value':17} {'in the name':12} {'parameters':>11} {'FLOPs':>6} {'saved':>6} {'step':>6}  "
          "what it is")
    fields = {f.name: f for f in dataclasses.fields(ModelConfig)}
    for key, options in {**AXES, **{k: {v: None} for k, v in VALUES.items()}}.items():
        baseline = dataclasses.replace(base, **beside(key))
        usual = baseline.resolve()
        for value, option in options.items():
            config = dataclasses.replace(baseline, **{key: value})
            label = option.label if option else (fields[key].metadata["label"] or "").format(value)
            text = option.help if option else fields[key].metadata["help"].partition(";")[0]
            if getattr(usual, key) == value:
                print(f"{key:19} {value!s:17} {label:12} {'·':>11} {'·':>6} {'·':>6} {'·':>6}  {text}")
                continue
            (parameters, *costs), (usual_parameters, *usual_costs) = account(config), account(baseline)
            flops, saved = (a / b for a, b in zip(costs, usual_costs, strict=True))
            ratio = step_ratio(config, baseline, args.steps, args.batch_size, device)
            print(f"{key:19} {value!s:17} {label:12} {parameters - usual_parameters:>+11,} {flops:>6.2f} {saved:>6.2f} "
                  f"{'–' if ratio is None else f'{ratio:.2f}':>6}  {text}", flush=True)
    print("\n· is the option it is compared with; – is not timed. FLOPs: of training, by the PaLM convention. saved: "
          "bytes\nfor the backward pass per token, on a GPU, in float32. step: time of a training step.")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
