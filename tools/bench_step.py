"""The whole training step: eager, compiled, with this project's kernels, with both, and nanoGPT's beside them.

    python -m tools.bench_step config/arch_llama.py config/size_124m.py --batch_size=16
    python -m tools.bench_step config/bench_nanogpt_cpu.py --vocab_size=65 --nanogpt_dir=../nanoGPT

It accepts every key of train.py. A step is forward and backward pass of each micro-batch, clipping and the optimizer's
step, in one process, on random tokens. In each round every variant takes a block of steps, in rotating order: the speed
of a computer drifts, so each block is compared with eager's of the same round.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
import torch

from blockgpt.accounting.meter import StepMeter
from blockgpt.console import ArgumentParser, align_columns, check_ranges, echo, human_bytes
from blockgpt.errors import ConfigError, UserError, exit_on_user_error
from blockgpt.files import is_file, user_path
from blockgpt.training import launch, parallel
from blockgpt.training.optimizers import build_optimizer, clip_gradients
from configurator import Config, load_config
from model_builder import build_model

VARIANTS = {"eager": (False, "torch"), "compiled": (True, "torch"), "kernels": (False, "triton"),
            "kernels+compiled": (True, "triton")}  # name: (compile, kernels)
WARM_UP = 3  # steps; the first compiles
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass
class Variant:
    """One way to take a step.

    Attributes:
        step: takes one.
        held: bytes on the GPU between steps.
        seconds: per step, of each block.
        peak: bytes on the GPU, those of the other variants not counted; None elsewhere.
    """

    name: str
    step: Callable[[], None]
    held: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: int | None = None


def variant_config(config: Config, compiled: bool, kernels: str) -> Config:
    """The config of a variant.

    Raises:
        ConfigError: the run has excluded it, or the model has no kernels.
    """
    if compiled and config.compile is False:
        raise ConfigError("compile", "False was set")
    if kernels == "triton" and config.model.kernels == "torch":
        raise ConfigError("kernels", "'torch' was set")
    if kernels == "triton" and not config.model.has_kernels():
        raise ConfigError("kernels", config.model.unused_keys()["kernels"])
    return dataclasses.replace(config, compile=compiled, model=dataclasses.replace(config.model, kernels=kernels))


def take_step(forward: Callable[..., Any], batches: list[Batch], optimizer: torch.optim.Optimizer,
              scaler: torch.amp.GradScaler, clip: Callable[[], object], runtime: launch.Runtime) -> None:
    """One step; each of its micro-batches has the same weight."""
    for x, y in batches:
        with runtime.autocast():
            loss = forward(x, y)
        scaler.scale(loss / len(batches)).backward()
    scaler.unscale_(optimizer)
    clip()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def own_step(config: Config, runtime: launch.Runtime, batches: list[Batch]) -> Callable[[], None]:
    """The step of this project's model."""
    model = build_model(config.model, config.seed, runtime.device,
                        lambda model: parallel.parallelize(model, config, runtime))
    wrapped = parallel.wrap(model, config, runtime)
    optimizer = build_optimizer(model, config, runtime.device)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    return lambda: take_step(wrapped, batches, optimizer, scaler, lambda: clip_gradients(model, config.grad_clip),
                             runtime)


def nanogpt_step(path: Path, config: Config, runtime: launch.Runtime, batches: list[Batch]) -> Callable[[], None]:
    """The step of the model in nanoGPT's model.py, at this model's size, as nanoGPT's train.py takes it."""
    spec: Any = importlib.util.spec_from_file_location("nanogpt_model", path)
    nanogpt: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    size = {key: getattr(config.model, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    torch.manual_seed(config.seed)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        model = nanogpt.GPT(nanogpt.GPTConfig(**size, dropout=0.0, bias=config.model.bias)).to(runtime.device)
        optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate,
                                               (config.beta1, config.beta2), runtime.device.type)
    wrapped = torch.compile(model) if runtime.compile else model
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)

    def clip() -> None:
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)

    return lambda: take_step(lambda x, y: wrapped(x, y)[1], batches, optimizer, scaler, clip, runtime)


def build_variants(config: Config, batches: list[Batch], nanogpt: Path | None) -> tuple[list[Variant], list[str]]:
    """(the variants that this computer can run, a line for each of the others)."""
    variants, skipped = [], []

    def add(name: str, compiled: bool, kernels: str, make: Callable[[Config, launch.Runtime], Any]) -> None:
        try:
            own = variant_config(config, compiled, kernels)
            runtime = launch.init(own)
        except ConfigError as error:
            if name == "eager":
                raise
            skipped.append(f"{name}: skipped, {error}")
            return
        allocated = runtime.memory()["allocated"] or 0
        variant = Variant(name, make(own, runtime))
        time_block(variant, runtime, WARM_UP)
        variant.held, variant.seconds = (runtime.memory()["allocated"] or 0) - allocated, []
        variants.append(variant)

    for name, (compiled, kernels) in VARIANTS.items():
        add(name, compiled, kernels, lambda own, runtime: own_step(own, runtime, batches))
    if nanogpt is not None:
        for name, compiled in (("nanoGPT", False), ("nanoGPT compiled", True)):
            add(name, compiled, "torch", lambda own, runtime: nanogpt_step(nanogpt, own, runtime, batches))
    return variants, skipped


def time_block(variant: Variant, runtime: launch.Runtime, steps: int) -> None:
    """Take `steps` steps, and note the seconds of one and the peak."""
    on_cuda = runtime.device.type == "cuda"
    others = (runtime.memory()["allocated"] or 0) - variant.held
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    started = runtime.clock.time()
    for _ in range(steps):
        variant.step()
    if on_cuda:
        torch.cuda.synchronize(runtime.device)
    variant.seconds.append((runtime.clock.time() - started) / steps)
    if on_cuda:
        variant.peak = max(variant.peak or 0, (runtime.memory()["peak"] or 0) - others)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return low, median, high


def step_table(variants: list[Variant], tokens: int, flops: float, peak: float | None) -> list[list[str]]:
    """Rows of text: one a variant.

    Args:
        variants: measured; the first is eager.
        tokens: of a step.
        flops: per token.
        peak: FLOP/s; None if unknown.
    """
    rows = [["variant", "tokens/s", "ms/step", "quartiles", "MFU", "peak memory", "of eager", "quartiles"]]
    for variant in variants:
        low, median, high = quartiles(variant.seconds)
        ratios = [a / b for a, b in zip(variant.seconds, variants[0].seconds, strict=True)]
        ratio_low, ratio, ratio_high = quartiles(ratios)
        rows.append([variant.name, f"{tokens / median:,.0f}", f"{1000 * median:,.2f}",
                     f"{1000 * low:,.2f}–{1000 * high:,.2f}",
                     f"{flops * tokens / median / peak:.1%}" if peak else "-",
                     human_bytes(variant.peak) if variant.peak else "-", f"{ratio:.3f}",
                     f"{ratio_low:.3f}–{ratio_high:.3f}"])
    return rows


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                            usage="%(prog)s [FILE.py …] [--key=value …] [--rounds=N] [--steps=N] [--nanogpt_dir=DIR]",
                            epilog="The other arguments are those of train.py (python train.py --help).")
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each variant")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--nanogpt_dir", type=user_path, help="a nanoGPT checkout, to run its model beside these")
    args, config_args = parser.parse_known_args(argv)
    check_ranges(args, {name: (getattr(args, name) >= 1, "at least 1") for name in ("rounds", "steps")})
    nanogpt = args.nanogpt_dir and args.nanogpt_dir / "model.py"
    if nanogpt and not is_file(nanogpt):
        raise UserError(f"--nanogpt_dir: {nanogpt} does not exist (git clone https://github.com/karpathy/nanoGPT)")
    config = load_config(config_args)
    if config.processes > 1 or config.use_fsdp or config.use_zero1:
        raise UserError("tools.bench_step measures one process without sharding (start it without torchrun, use_fsdp "
                        "and use_zero1)")
    runtime = launch.init(variant_config(config, *VARIANTS["eager"]))
    shape = config.batch_size, config.model.block_size
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(0, config.model.vocab_size, (config.gradient_accumulation_steps, *shape),
                           generator=generator).to(runtime.device)
    batches = [(x, x.roll(-1, dims=1)) for x in tokens]
    variants, skipped = build_variants(config, batches, nanogpt)
    model = build_model(config.model, config.seed, torch.device("meta"))
    meter = StepMeter(model, config, runtime, tokens.numel())
    echo(f"{model.infer_config().arch_name()}, block {shape[1]}, batch {' × '.join(map(str, tokens.shape[:2]))}, "
         f"{runtime.dtype} on {runtime.name()}, torch {torch.__version__}; {args.rounds} blocks of {args.steps} steps; "
         f"peak for MFU: {meter.peak_source}")
    for line in skipped:
        echo(line)
    for i in range(args.rounds):
        first = i % len(variants)
        for variant in variants[first:] + variants[:first]:
            time_block(variant, runtime, args.steps)
    rows = step_table(variants, tokens.numel(), meter.flops["train"], meter.peak)
    echo("\n".join(align_columns(rows, left=(0,))))


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
