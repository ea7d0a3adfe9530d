"""Before any money is spent: what a run is, what it needs and what it costs. `python train.py … --dry_run`.

Weights are never allocated and nothing is written. The account of one process comes from `model_memory`; here it is
shared out over GPUs, held against their memory, and told. A way of sharing is a `Mode`; what `training_parallel`
does not know yet is not among `AVAILABLE` and told as an estimate; what is known is for `chosen` to choose.
"""

import os
from dataclasses import dataclass, fields
from functools import partial

import torch

import training_parallel as parallel
from data_prepare import dataset_dir, is_bare, not_prepared
from errors import ConfigError, did_you_mean
from model_flops import GPUS, find_gpu, flops_per_token, gpu_called, look_up_peak, peak_flops
from model_memory import MemoryAccount
from training_logger import human_bytes, in_columns, tell
from training_objectives import LanguageModeling

# Of a GPU's memory, for what torch's allocator does not hand out or hands out in pieces: CUDA's context and NCCL's
# buffers (about 1 GiB together), the kernels' own workspaces, error correction on cards that take it from their memory
# (a sixteenth), fragmentation.
RESERVE = 0.08


@dataclass(frozen=True)
class Mode:
    """A way of sharing the training of one model. sharded: what a process holds 1/N of.

    keeps_gradients: whether their storage outlives the step, as DDP's buckets do.
    """

    name: str
    sharded: tuple = ()
    keeps_gradients: bool = False


SINGLE = Mode("single")
DDP = Mode("DDP", keeps_gradients=True)
ZERO1 = Mode("ZeRO-1", sharded=("optimizer",), keeps_gradients=True)
FSDP = Mode("FSDP", sharded=("parameters", "gradients", "optimizer"))
MODES = (SINGLE, DDP, ZERO1, FSDP)
AVAILABLE = ((SINGLE, False), (DDP, False))  # (mode, activation checkpointing)


def chosen(config):
    """(the `Mode` of a run, whether it checkpoints activations)."""
    return (DDP if config.processes > 1 else SINGLE), False


@dataclass(frozen=True)
class Need:
    """Bytes that one process holds at the fullest moment of a step; the fields add up to `total`.

    gathered: whole blocks of parameters and gradients that FSDP puts together for the moment. activations, logits:
    what is saved, and what the work of that moment takes beside it (logits: in the head and the loss).
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self):
        return sum(vars(self).values())


def need(account, mode, checkpointing, processes, sequences, accumulating):
    """The `Need` of each of `processes` processes for micro-batches of `sequences`.

    account: a `MemoryAccount`. accumulating: whether a process takes several micro-batches a step.
    FSDP gathers in the precision of the matrix products and frees what it gathered: no copies of weights are kept.
    """
    def share(what, size):
        return -(-size // processes) if what in mode.sharded else size

    gathers = "parameters" in mode.sharded
    keeps = accumulating or mode.keeps_gradients
    moments = account.moments(sequences, checkpointing, accumulating=keeps, copies=not gathers)
    held = [(share("gradients", account.gradient_bytes if keeps else made), *rest) for made, *rest in moments]
    gradients, activations, logits = max(held, key=sum)
    return Need(share("parameters", account.parameter_bytes), gradients, share("optimizer", account.optimizer_bytes),
                2 * gathered_bytes(account) if gathers else 0, activations, logits)


def gathered_bytes(account):
    """The two largest of FSDP's groups, in the products' precision: each block is one, and the rest of the model."""
    blocks = [block.parameters for block in account.blocks]
    groups = sorted([*blocks, account.parameter_bytes - sum(blocks)])[-2:]
    return sum(groups) * account.dtype.itemsize // torch.float32.itemsize


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
    device = parallel.choose_device(config.device, 0)
    dtype = parallel.choose_dtype(config.dtype, device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu, memory = find_gpu(name), torch.cuda.get_device_properties(device).total_memory
        peak = peak_flops(device, dtype, config.tf32, config.mfu_peak)
        return Target(name, True, dtype, memory, gpu and gpu.watts, *peak)
    known = not isinstance(config.mfu_peak, str)  # a CPU's would be measured, of a machine that is doing something else
    peak = peak_flops(device, dtype, False, config.mfu_peak) if known else (None, NO_PEAK)
    return Target(f"this machine ({device.type})", False, dtype, machine_memory() // config.processes, None, *peak)


def named_target(config):
    gpu = gpu_called(config.dry_run_gpu)
    if gpu is None:
        raise ConfigError("dry_run_gpu", f"{config.dry_run_gpu!r} is not in the table of model_flops.py"
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

    mode: Mode
    checkpointing: bool
    need: Need
    fits: bool
    largest: int


def table(account, config, budget):
    """[`Row`] of every mode for the processes of the run, with and without activation checkpointing."""
    def row(mode, checkpointing):
        processes = 1 if mode is SINGLE else config.processes
        of = partial(need, account, mode, checkpointing, processes,
                     accumulating=config.gradient_accumulation_steps > processes)
        own = of(config.batch_size)
        return Row(mode, checkpointing, own, own.total <= budget, largest(lambda n: of(n).total <= budget))

    modes = MODES if config.processes > 1 else (SINGLE,)
    return [row(mode, checkpointing) for mode in modes for checkpointing in (False, True)]


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
    mode, checkpointing = chosen(config)
    sequences = config.batch_size * config.gradient_accumulation_steps // config.processes  # of a process, a step
    for size in range(min(config.batch_size, sequences) - 1, 0, -1):
        if sequences % size == 0:
            parts = sequences // size
            if need(account, mode, checkpointing, config.processes, size, parts > 1).total <= budget:
                return size, parts * config.processes
    return None


def advice(account, config, budget, rows):
    """What would make a run fit that does not, in one line."""
    smaller = smaller_batches(account, config, budget)
    if smaller:
        return ("it fits, with the same sequences a step, as: "
                "--batch_size={} --gradient_accumulation_steps={}".format(*smaller))
    other = next((row for row in rows if row.largest and (row.mode is not SINGLE or config.processes == 1)), None)
    if other:
        there = (other.mode, other.checkpointing) in AVAILABLE
        return (f"no batch_size fits; {described(other.mode, other.checkpointing)} would, up to "
                f"batch_size={other.largest}" + ("" if there else f", but is not there yet: until then {SMALLER}"))
    return f"nothing makes it fit on {config.processes} of these: {SMALLER}"


SMALLER = "a smaller n_layer, n_embd, block_size or vocab_size, or a device with more memory"


def described(mode, checkpointing):
    return mode.name + (" with activation checkpointing" if checkpointing else "")


# -------------------------------------------------------------------- what is told


def preflight(config):
    """Print what the run that `config` describes would be; 0 if it fits in memory, 1 if not.

    `UserError` for what would stop the run at its start, such as a dataset that is not there; but where vocab_size is
    set by hand, one that is not prepared is only told.
    """
    if int(os.environ.get("RANK", "0")):
        return 0  # torchrun's first process tells it
    target = find_target(config)
    parallel.check_trainable(config.model, "cuda" if target.gpu else "cpu")
    config, data = look_at_data(config)
    account = MemoryAccount(config.model, target.dtype, target.gpu)
    rows = table(account, config, target.budget)
    for name, text in (*model_lines(account), *run_lines(config, target, account, data)):
        tell(in_columns(f"{name:<22} ", text))
    tell("\n" + "\n".join(table_lines(config, rows)) + "\n")
    row = next(row for row in rows if (row.mode, row.checkpointing) == chosen(config))
    for line in verdict_lines(account, config, target, rows, row):
        tell(line)
    for name, reason in config.without_effect().items():
        tell(f"note: {config.explicit[name]}: {name} has no effect here: {reason}")
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
    alone = parallel.Machine(0, 0, 1, torch.device("cpu"), torch.float32, False, False)
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
        ("architecture", model.built().arch_name()),
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
                f"batch_size {config.batch_size}, {config.gradient_accumulation_steps // processes} micro-batches a "
                "step on each process"),
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
    head = ["", "GiB per process", *("logits, loss" if f.name == "logits" else f.name for f in fields(Need)), "total",
            "fits", "largest"]
    lines = [head]
    for row in rows:
        own = ">" if (row.mode, row.checkpointing) == chosen(config) else ""
        star = "" if (row.mode, row.checkpointing) in AVAILABLE else " *"
        sizes = [f"{size / 2**30:,.2f}" for size in (*vars(row.need).values(), row.need.total)]
        lines.append([own, f"{row.mode.name}{', checkpointing' if row.checkpointing else ''}{star}", *sizes,
                      "yes" if row.fits else "no", str(row.largest or "none")])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in
                      enumerate(zip(line, widths, strict=True))) for line in lines]
    return [*text, "",
            "At the fullest moment of a step of this batch_size. largest: the largest batch_size that fits, exactly.",
            "Where a step is one micro-batch, gradients are made as activations go, and may not be there at that time.",
            "* an estimate: this program cannot do it yet."]


def verdict_lines(account, config, target, rows, row):
    what = f"{described(row.mode, row.checkpointing)}, batch_size={config.batch_size}"
    sizes = f"{human_bytes(row.need.total)} of {human_bytes(target.budget)}"
    if row.fits:
        return [f"fits: {what} needs {sizes}"]
    return [f"does not fit: {what} needs {sizes}", advice(account, config, target.budget, rows)]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")
