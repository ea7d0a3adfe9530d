"""Before any money is spent: what a run is, what it needs and what it costs. `python train.py … --dry_run`.

Weights are never allocated and nothing is written. The account of one process comes from `blockgpt.accounting.memory`; here it is
shared out over GPUs, held against their memory, and told. A way of sharing is a `ParallelMode`: a line in `parallel_modes`, what it
holds in `memory_need`.
"""

import os
from dataclasses import dataclass, fields
from functools import partial

import torch

from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.hardware import GPUS, find_gpu, find_gpu_by_alias, look_up_peak, peak_flops
from blockgpt.accounting.memory import MemoryAccount
from blockgpt.accounting.requirements import (
    SINGLE,
    MemoryNeed,
    ParallelMode,
    chosen_mode,
    memory_need,
    parallel_modes,
    part_of_model,
    state_of,
)
from blockgpt.console import echo, human_bytes, in_columns
from blockgpt.data.dataset import dataset_dir, is_bare, not_prepared
from blockgpt.errors import ConfigError, did_you_mean
from blockgpt.training.device import choose_device, choose_dtype
from blockgpt.training.launch import Runtime
from blockgpt.training.objectives import LanguageModeling

# Of a GPU's memory, for what torch's allocator does not hand out or hands out in pieces: CUDA's context and NCCL's
# buffers (about 1 GiB together), the kernels' own workspaces, error correction on cards that take it from their memory
# (a sixteenth), fragmentation.
RESERVE = 0.08


# -------------------------------------------------------------------- where it will run


@dataclass(frozen=True)
class Target:
    """What a process of the run computes on. memory in bytes, watts and peak (FLOP/s) None where they are not known."""

    name: str
    gpu: bool
    dtype: torch.dtype
    memory: int
    watts: int | None
    peak: float | None
    peak_source: str

    @property
    def budget(self):
        return int(self.memory * (1 - RESERVE))


NO_PEAK = "the peak of this machine is measured by a run alone (set one with --mfu_peak=TFLOPS)"


def find_target(config):
    """The `Target` that dry_run_gpu names; without a name the GPU that is here, else this machine."""
    if config.dry_run_gpu is not None:
        return named_target(config)
    device = choose_device(config.device, 0)
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu, memory = find_gpu(name), torch.cuda.get_device_properties(device).total_memory
        peak = peak_flops(device, dtype, config.tf32, config.mfu_peak)
        return Target(name, True, dtype, memory, gpu and gpu.watts, *peak)
    known = not isinstance(config.mfu_peak, str)  # a CPU's would be measured, of a machine that is doing something else
    peak = peak_flops(device, dtype, False, config.mfu_peak) if known else (None, NO_PEAK)
    return Target(f"this machine ({device.type})", False, dtype, machine_memory() // config.processes, None, *peak)


def named_target(config):
    gpu = find_gpu_by_alias(config.dry_run_gpu)
    if gpu is None:
        raise ConfigError("dry_run_gpu", f"{config.dry_run_gpu!r} is not in the table of accounting/flops.py"
                                         f"{did_you_mean(config.dry_run_gpu, [g.name for g in GPUS])}")
    name = config.dtype if config.dtype != "auto" else "bfloat16" if "bfloat16" in gpu.peaks else "float32"
    if name == "bfloat16" and name not in gpu.peaks:
        raise ConfigError("dtype", f"'bfloat16': a {gpu.name} has none (--dtype=float16)")
    kind = "tf32" if name == "float32" and config.tf32 else name
    peak = ((config.mfu_peak * 1e12, "as --mfu_peak says") if not isinstance(config.mfu_peak, str)
            else look_up_peak(gpu.name, kind, sparse=config.mfu_peak == "sparse"))
    return Target(gpu.name, True, getattr(torch, name), gpu.memory * 2**30, gpu.watts, *peak)


def machine_memory():
    """Bytes of memory of this machine, or of the control group that holds this process to fewer."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max") as f:
            return min(memory, int(f.read()))
    except (OSError, ValueError):  # no such limit: no such file, or the word max in it
        return memory


# -------------------------------------------------------------------- what fits


@dataclass(frozen=True)
class Row:
    """A line of the table: a mode at the batch_size of the run, and the largest micro-batch that fits (0: none)."""

    mode: ParallelMode
    checkpointing: str
    memory_need: MemoryNeed
    fits: bool
    largest: int


def table(account, config, budget):
    """[`Row`] of every mode for the processes of the run, with every kind of activation checkpointing."""
    def row(mode, checkpointing):
        of = partial(memory_need, account, mode, checkpointing, accumulating=config.gradient_accumulation_steps > mode.data)
        own = of(config.batch_size)
        return Row(mode, checkpointing, own, own.total <= budget, largest(lambda n: of(n).total <= budget))

    return [row(mode, kind) for mode in parallel_modes(config) for kind in ("none", "selective", "full")]


def largest(fits):
    """The largest whole number from 1 on that `fits`, which holds up to it and not beyond; 0 if there is none."""
    beyond = 1
    while fits(beyond):
        beyond *= 2
    low = beyond // 2
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if fits(middle) else (low, middle)
    return low


def smaller_batches(account, config, budget):
    """(batch_size, gradient_accumulation_steps) of the largest micro-batch that fits in a step of as many sequences."""
    mode, checkpointing = chosen_mode(config)
    sequences = config.batch_size * config.gradient_accumulation_steps // config.data_processes  # of each, a step
    for size in range(min(config.batch_size, sequences) - 1, 0, -1):
        if sequences % size == 0:
            parts = sequences // size
            if memory_need(account, mode, checkpointing, size, parts > 1).total <= budget:
                return size, parts * config.data_processes
    return None


def advice(account, config, budget, rows):
    """What would make a run fit that does not, in one line."""
    smaller = smaller_batches(account, config, budget)
    if smaller:
        return ("it fits, with the same sequences a step, as: "
                "--batch_size={} --gradient_accumulation_steps={}".format(*smaller))
    mode, _ = chosen_mode(config)
    able = [row for row in rows if row.largest and (row.mode is not SINGLE or config.processes == 1)]
    for row in sorted(able, key=lambda row: row.mode != mode):  # checkpointing first, then other modes in their order
        return (f"no batch_size fits; {described(row.mode, row.checkpointing)} would, up to batch_size={row.largest}: "
                f"{flags_of(row)}")
    return f"nothing makes it fit on {config.processes} of these: {SMALLER}"


SMALLER = "a smaller n_layer, n_embd, block_size or vocab_size, or a device with more memory"


def described(mode, checkpointing):
    return mode.name + (f" with {checkpointing} activation checkpointing" if checkpointing != "none" else "")


def flags_of(row):
    """The flags that ask for what a row tells of."""
    return (f"--use_zero1={row.mode.zero1} --use_fsdp={row.mode.fsdp} "
            f"--activation_checkpointing={row.checkpointing}")


# -------------------------------------------------------------------- what is told


def dry_run(config, build_model):
    """Print what the run that `config` describes would be; 0 if it fits in memory, 1 if not.

    `UserError` for what would stop the run at its start, such as a dataset that is not there; but where vocab_size is
    set by hand, one that is not prepared is only told.
    """
    if int(os.environ.get("RANK", "0")):
        return 0  # torchrun's first process tells it
    target = find_target(config)
    config.model.check_trainable_on("cuda" if target.gpu else "cpu")
    config, data = look_at_data(config)
    account = MemoryAccount(build_model, config.model, target.dtype, target.gpu)
    tensor = config.tensor_parallel
    part = MemoryAccount(build_model, part_of_model(config.model, tensor), target.dtype, target.gpu) if tensor > 1 else account
    rows = table(part, config, target.budget)
    for name, text in (*model_lines(account), *run_lines(config, target, account, data)):
        echo(in_columns(f"{name:<22} ", text))
    echo("\n" + "\n".join([*table_lines(config, rows), *remarks(config, part)]) + "\n")
    row = next(row for row in rows if (row.mode, row.checkpointing) == chosen_mode(config))
    for line in verdict_lines(part, config, target, rows, row):
        echo(line)
    for name, reason in config.keys_without_effect().items():
        echo(f"note: {config.explicit[name]}: {name} has no effect here: {reason}")
    return 0 if row.fits else 1


def look_at_data(config):
    """(the config with the data's vocabulary, the data in words with the epochs that the run makes of them)."""
    for name in {name for _, sources in config.phases() for name, share in sources.items() if share}:
        directory = dataset_dir(name, config.data_dir)
        if not (directory / "meta.json").exists() and not is_bare(directory):
            missing = not_prepared(name, config.data_dir)
            if "vocab_size" not in config.explicit:
                raise missing
            return config, f"not known: {missing}"
    alone = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, False, False)
    objective = LanguageModeling(config, alone)  # tells what the run would be told at its start
    data = objective.description()
    epochs = "; ".join(f"{name} {source['planned_epochs']:.3g} epochs" for name, source in data["sources"].items())
    return (config.for_vocabulary(objective.vocab_size),
            f"{data['dataset']}: {data['train_tokens']:,} training tokens; the run is {epochs}")


def tokens_of(config):
    return (config.batch_size * config.gradient_accumulation_steps * config.model.block_size) * config.max_iters


def by_part(amounts, unit="", scale=1, digits=0):
    whole = sum(amounts.values()) or 1
    return " · ".join(f"{part} {n / scale:,.{digits}f}{unit} ({n / whole:.0%})" for part, n in amounts.items())


def model_lines(account):
    """(name, text) of what the model is, whatever it runs on."""
    model, length = account.model, account.block_size
    flops = flops_per_token(model, length)
    saved = account.saved_by_part()
    per_token = {part: line.per_sequence / length for part, line in saved.items()}
    fixed = sum(line.fixed for line in saved.values())
    counts = account.parameters_by_part()
    return [
        ("architecture", model.infer_config().arch_name()),
        ("parameters", f"{sum(counts.values()):,}: {by_part(counts)}"),
        ("FLOPs per token", f"forward {sum(flops['forward'].values()) / 1e6:,.2f}M: "
                            f"{by_part(flops['forward'], 'M', 1e6, 2)}"),
        ("", f"training {flops['train'] / 1e6:,.2f}M (PaLM convention), {flops['train_causal'] / 1e6:,.2f}M (causal)"),
        ("saved per token", f"{sum(per_token.values()) / 2**10:,.1f} KiB: {by_part(per_token, ' KiB', 2**10, 1)}"),
        ("", f"and {human_bytes(fixed)} whatever the batch (weights in {name_of(account.dtype)} where that is not "
             "float32, masks and tables); eager: torch.compile saves less"),
    ]


def run_lines(config, target, account, data):
    """(name, text) of what the run does, on what, for how long."""
    tokens, processes = tokens_of(config), config.processes
    sequences = config.batch_size * config.gradient_accumulation_steps
    asked = f" (for {config.dry_run_gpu!r})" if config.dry_run_gpu not in (None, target.name) else ""
    power = f", {target.watts} W" if target.watts else ""
    return [
        ("run", f"{tokens:,} tokens: {config.max_iters:,} steps of {sequences:,} sequences of {account.block_size:,}; "
                f"batch_size {config.batch_size}, {config.gradient_accumulation_steps // config.data_processes} "
                "micro-batches a step on each process"),
        ("data", data),
        ("device", f"{processes} × {target.name}{asked}: {human_bytes(target.memory)}{power}, {name_of(target.dtype)}"),
        ("kept aside", f"{human_bytes(target.memory - target.budget)} ({RESERVE:.0%}: the device's context, "
                       f"workspaces, fragmentation), leaving {human_bytes(target.budget)}"),
        ("time", time_text(config, target, account, tokens)),
    ]


def time_text(config, target, account, tokens):
    """How long and how much energy, or why that is not known."""
    if target.peak is None:
        return f"not known: {target.peak_source}"
    flops = flops_per_token(account.model, account.block_size)["train"] * tokens
    hours = flops / (target.peak * config.dry_run_mfu * config.processes) / 3600
    energy = (f"; {target.watts * config.processes * hours / 1000:,.4g} kWh at {target.watts} W a GPU" if target.watts
              else "; energy not known")
    return (f"{hours:,.4g} hours ({hours / 24:,.3g} days) at {config.dry_run_mfu:.0%} MFU of "
            f"{target.peak / 1e12:,.4g} TFLOP/s ({target.peak_source}), {hours * config.processes:,.4g} device hours"
            f"{energy}")


def table_lines(config, rows):
    """The table of needs in GiB, a row for each mode; the run's own is marked with >."""
    head = ["", "GiB per process", *("logits, loss" if f.name == "logits" else f.name for f in fields(MemoryNeed)), "total",
            "fits", "largest"]
    lines = [head]
    for row in rows:
        own = ">" if (row.mode, row.checkpointing) == chosen_mode(config) else ""
        name = row.mode.name + (f", {row.checkpointing}" if row.checkpointing != "none" else "")
        sizes = [f"{size / 2**30:,.2f}" for size in (*vars(row.need).values(), row.need.total)]
        lines.append([own, name, *sizes,
                      "yes" if row.fits else "no", str(row.largest or "none")])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in
                      enumerate(zip(line, widths, strict=True))) for line in lines]
    return [*text, ""]


def remarks(config, account):
    """What the table needs to be said of it."""
    lines = ["At the fullest moment of a step of this batch_size. largest: the largest batch_size that fits, exactly.",
             "selective, full: activation_checkpointing. Where a step is one micro-batch, gradients are made as",
             "activations go, and may not be there at that time."]
    mode, _ = chosen_mode(config)
    if any(m.fsdp for m in parallel_modes(config)):
        lines.append("gathered: an estimate from above. FSDP's gradients are whole where a step is several "
                     "micro-batches.")
    if mode.tensor > 1:
        lines.append(f"TP{mode.tensor}: an estimate, of a model with 1/{mode.tensor} of the heads, of d_ff and of the "
                     "vocabulary's rows; logits are whole.")
    if mode.offloads and account.gpu:
        state = state_of(account, mode)
        lines.append(f"fsdp_cpu_offload: {human_bytes(state.parameters + state.gradients + state.optimizer)} of "
                     "parameters, gradients and optimizer state of each process are in the host's memory.")
    return lines


def verdict_lines(account, config, target, rows, row):
    what = f"{described(row.mode, row.checkpointing)}, batch_size={config.batch_size}"
    sizes = f"{human_bytes(row.need.total)} of {human_bytes(target.budget)}"
    if row.fits:
        return [f"fits: {what} needs {sizes}"]
    return [f"does not fit: {what} needs {sizes}", advice(account, config, target.budget, rows)]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")
