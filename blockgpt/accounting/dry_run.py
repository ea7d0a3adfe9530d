"""`python train.py ... --dry_run`: prints what a run is, how much memory it needs and what it costs, without training.

No weight is allocated and nothing is written. `memory.py` and `requirements.py` compute the memory, `flops.py` the
FLOPs, `hardware.py` has the table of GPUs; this module compares them and prints the result.
"""

import os
import resource
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn

from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.hardware import (
    GPUS,
    SET_PEAK,
    dtype_name,
    find_gpu,
    find_gpu_by_alias,
    gpu_peak_flops,
    peak_flops,
)
from blockgpt.accounting.memory import MemoryAccount
from blockgpt.accounting.requirements import (
    SINGLE,
    MemoryNeed,
    ParallelMode,
    chosen_mode,
    memory_need,
    model_state,
    parallel_modes,
    tensor_parallel_config,
)
from blockgpt.checkpoints.initial_weights import checkpoint_weights
from blockgpt.console import align_columns, echo, human_bytes, in_columns, percentages
from blockgpt.data.dataset import dataset_dir, is_bare, not_prepared
from blockgpt.errors import ConfigError, did_you_mean
from blockgpt.files import exists, list_dir
from blockgpt.huggingface.hub import checkpoint_directory, is_checkpoint_name
from blockgpt.huggingface.read import read_config
from blockgpt.training.device import choose_device, choose_dtype
from blockgpt.training.launch import Runtime

CHECKPOINTING = ("none", "selective", "full")  # activation_checkpointing, from the least recomputation to the most

# The fraction of a GPU's memory that torch's tensors cannot use: the CUDA context and NCCL's buffers (about 1 GiB
# together), the workspaces of kernels, error correction on cards that take it from their memory (a sixteenth), and
# fragmentation.
RESERVE = 0.08


def dry_run(config: Any, build_model: Callable[[Any], nn.Module]) -> int:
    """Print what the run described by `config` would be.

    Args:
        config: the run's configuration.
        build_model: builds the model of a model configuration, on the device of the context.

    Returns:
        The exit code: 0 if the run fits in memory, 1 if not.

    Raises:
        UserError: what would stop the run at its start, such as a missing dataset. With an explicit vocab_size, a
            dataset that is not prepared is reported, but is not an error.
    """
    if int(os.environ.get("RANK", "0")):
        return 0  # rank zero prints
    target = find_target(config)
    config.model.check_trainable_on("cuda" if target.gpu else "cpu")
    config, data = inspect_data(config)
    frozen = config.companion_models()
    account = per_process = MemoryAccount(build_model, config.model, target.dtype, target.gpu, frozen,
                                          config.batch_size)
    if config.tensor_parallel > 1:
        model_config, *frozen = (tensor_parallel_config(model, config.tensor_parallel)
                                 for model in (config.model, *frozen))
        per_process = MemoryAccount(build_model, model_config, target.dtype, target.gpu, frozen, config.batch_size)
    rows = memory_table(per_process, config, target.budget)
    for name, text in (*model_lines(account), *weight_lines(config, account),
                       *run_lines(config, target, account, data)):
        echo(in_columns(f"{name:<22} ", text))
    echo("\n" + "\n".join([*table_lines(config, rows), *table_notes(config, per_process)]) + "\n")
    row = next(row for row in rows if (row.mode, row.checkpointing) == chosen_mode(config))
    for line in verdict_lines(per_process, config, target, rows, row):
        echo(line)
    for line in config.notes("cuda" if target.gpu else choose_device(config.device, 0).type, dtype_name(target.dtype)):
        echo(f"note: {line}")
    return 0 if row.fits else 1


# ---------------------------------------------------------------- where the run would be


@dataclass(frozen=True)
class Target:
    """What one process of the run computes on.

    Attributes:
        name: of the device, as printed.
        gpu: whether the operators are CUDA's.
        dtype: of the matrix products.
        memory: in bytes.
        watts: of the board; None if unknown.
        peak: in FLOP/s; None if unknown.
        peak_source: where the peak comes from, or why it is unknown.
    """

    name: str
    gpu: bool
    dtype: torch.dtype
    memory: int
    watts: int | None
    peak: float | None
    peak_source: str

    @property
    def budget(self) -> int:
        """Bytes that torch's tensors can use."""
        return int(self.memory * (1 - RESERVE))


def find_target(config: Any) -> Target:
    """The device that dry_run_gpu names; without it the GPU of this computer, or else its CPU."""
    if config.dry_run_gpu is not None:
        return named_target(config)
    device = choose_device(config.device, 0)
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu, memory = find_gpu(name), torch.cuda.get_device_properties(device).total_memory
        peak, source = peak_flops(device, dtype, config.tf32, config.mfu_peak)
        return Target(name, True, dtype, memory, gpu and gpu.watts, peak, source)
    peak, source = None, f"only a run measures the peak of this computer ({SET_PEAK})"
    if not isinstance(config.mfu_peak, str):
        peak, source = peak_flops(device, dtype, False, config.mfu_peak)
    return Target(f"this computer ({device.type})", False, dtype, host_memory() // config.processes, None, peak, source)


def named_target(config: Any) -> Target:
    """The device that dry_run_gpu names. Raises `ConfigError` for an unknown one, or a dtype that it does not have."""
    gpu = find_gpu_by_alias(config.dry_run_gpu)
    if gpu is None:
        suggestion = did_you_mean(config.dry_run_gpu, [g.name for g in GPUS])
        raise ConfigError("dry_run_gpu", f"{config.dry_run_gpu!r} is not in the table of "
                                         f"blockgpt/accounting/hardware.py{suggestion}")
    name = config.dtype if config.dtype != "auto" else "bfloat16" if "bfloat16" in gpu.peaks else "float32"
    if name == "bfloat16" and name not in gpu.peaks:
        raise ConfigError("dtype", f"'bfloat16': a {gpu.name} has none (--dtype=float16)")
    dtype = getattr(torch, name)
    peak, source = gpu_peak_flops(gpu.name, dtype, config.tf32, config.mfu_peak)
    return Target(gpu.name, True, dtype, gpu.memory * 2**30, gpu.watts, peak, source)


def host_memory() -> int:
    """Bytes of memory of this computer, or the lower limit of this process or its control group."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        memory = min(memory, limit)
    try:
        with open("/sys/fs/cgroup/memory.max") as f:
            return min(memory, int(f.read()))
    except (OSError, ValueError):  # no limit: no such file, or the word max in it
        return memory


# ---------------------------------------------------------------- what fits


@dataclass(frozen=True)
class TableRow:
    """One row of the printed table.

    Attributes:
        mode, checkpointing: how the run would be trained.
        need: at the batch_size of the run.
        fits: whether that fits.
        largest: the largest batch_size that fits; 0 if none does.
    """

    mode: ParallelMode
    checkpointing: str
    need: MemoryNeed
    fits: bool
    largest: int


def memory_table(account: MemoryAccount, config: Any, budget: int) -> list[TableRow]:
    """The rows of all modes that the processes of the run can train in, and all activation checkpointing modes."""
    def row(mode: ParallelMode, checkpointing: str) -> TableRow:
        def need(sequences: int) -> MemoryNeed:
            return memory_need(account, mode, checkpointing, sequences,
                               accumulating=config.gradient_accumulation_steps > mode.dp_size)

        # A sequence takes more than a byte. A larger batch never needs less, except one whose loss is chunked.
        for batches in (range(uncut + 1, budget + 1), range(1, uncut + 1)):
            fitting = bisect_right(batches, budget, key=lambda sequences: need(sequences).total)
            if fitting:
                break
        run = need(config.batch_size)
        return TableRow(mode, checkpointing, run, run.total <= budget, batches[fitting - 1] if fitting else 0)

    uncut = min(account.loss_chunk // account.block_size, budget)  # the largest batch whose loss is not chunked

    return [row(mode, checkpointing) for mode in parallel_modes(config) for checkpointing in CHECKPOINTING]


def smaller_batches(account: MemoryAccount, config: Any, budget: int) -> tuple[int, int] | None:
    """(batch_size, gradient_accumulation_steps) that fit, with the same sequences per step; the largest micro-batch."""
    mode, checkpointing = chosen_mode(config)
    sequences = config.batch_size * config.gradient_accumulation_steps // config.data_processes  # per process and step
    for size in range(min(config.batch_size, sequences) - 1, 0, -1):
        if sequences % size == 0:
            micro_steps = sequences // size
            if memory_need(account, mode, checkpointing, size, micro_steps > 1).total <= budget:
                return size, micro_steps * config.data_processes
    return None


SMALLER = "a smaller n_layer, n_embd, block_size or vocab_size, or a device with more memory"


def advice(account: MemoryAccount, config: Any, budget: int, rows: list[TableRow]) -> str:
    """One line that says how to change a run that does not fit."""
    smaller = smaller_batches(account, config, budget)
    if smaller:
        return ("it fits, with the same sequences per step, as: "
                "--batch_size={} --gradient_accumulation_steps={}".format(*smaller))
    mode, _ = chosen_mode(config)
    fitting = [row for row in rows if row.largest and (row.mode is not SINGLE or config.processes == 1)]
    if not fitting:
        return f"no mode fits on {config.processes} of these devices: use {SMALLER}"
    row = min(fitting, key=lambda row: row.mode != mode)  # another checkpointing mode, then the first other mode
    return (f"no batch_size fits; {mode_name(row)} does, up to batch_size={row.largest}: --use_zero1={row.mode.zero1} "
            f"--use_fsdp={row.mode.fsdp} --activation_checkpointing={row.checkpointing}")


def mode_name(row: TableRow) -> str:
    if row.checkpointing == "none":
        return row.mode.name
    return f"{row.mode.name} with {row.checkpointing} activation checkpointing"


# ---------------------------------------------------------------- what is printed


def inspect_data(config: Any) -> tuple[Any, str]:
    """(the config with the vocabulary of its data, a description of the data and of the epochs that the run reads)."""
    for name in {name for _, weights in config.phases() for name, weight in weights.items() if weight}:
        directory = dataset_dir(name, config.data_dir)
        if not exists(directory / "meta.json") and not is_bare(directory):
            missing = not_prepared(name, config.data_dir)
            if "vocab_size" not in config.explicit:
                raise missing
            return config, f"unknown: {missing}"
    single_process = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, False, False)
    objective = config.build_objective(single_process)  # raises what would stop the run at its start
    data = objective.description()
    epochs = "; ".join(f"{name} {source['planned_epochs']:.3g} epochs" for name, source in data["sources"].items())
    return (config.for_vocabulary(objective.vocab_size),
            f"{data['dataset']}: {data['train_tokens']:,} training tokens; the run is {epochs}")


def training_tokens(config: Any) -> int:
    return config.batch_size * config.gradient_accumulation_steps * config.model.block_size * config.max_iters


def model_lines(account: MemoryAccount) -> list[tuple[str, str]]:
    """(name, text) of what the model is, on any device."""
    model: Any = account.model
    flops = flops_per_token(model, account.block_size)
    saved = account.saved_by_category()
    per_token = {category: size.per_sequence / account.block_size for category, size in saved.items()}
    fixed = sum(size.fixed for size in saved.values())
    counts = account.parameters_by_category()
    return [
        ("architecture", model.infer_config().arch_name()),
        ("parameters", f"{sum(counts.values()):,}: {percentages(counts)}"),
        ("FLOPs per token", f"forward {sum(flops['forward'].values()) / 1e6:,.2f}M: "
                            f"{percentages(flops['forward'], 'M', 1e6, 2)}"),
        ("", f"training {flops['train'] / 1e6:,.2f}M (PaLM convention), {flops['train_causal'] / 1e6:,.2f}M (causal)"),
        ("saved per token", f"{sum(per_token.values()) / 2**10:,.1f} KiB: {percentages(per_token, ' KiB', 2**10, 1)}"),
        ("", f"and {human_bytes(fixed)} at any batch size (weights in {dtype_name(account.dtype)} if that is not "
             "float32, masks and tables); eager: torch.compile saves less"),
    ]


def weight_lines(config: Any, account: MemoryAccount) -> list[tuple[str, str]]:
    """(name, text) of the weights that the run begins with, if `init_from` names some.

    Raises:
        UserError: the tensors of a checkpoint of transformers are not those of the model.
    """
    if config.init_from is None or config.resuming:
        return []
    text = "all parameters are trained"
    if is_checkpoint_name(config.init_from):
        directory = checkpoint_directory(config.init_from)
        fit = "its tensors are not downloaded yet"  # a name on the hub
        if any(list_dir(directory, pattern) for pattern in ("*.safetensors", "pytorch_model*.bin")):
            fit = f"its {len(checkpoint_weights(directory, account.model).file_names)} tensors fit"
        text = f"{read_config(directory)['model_type']}; {fit}; {text}"
    return [("weights", f"{config.init_from}: {text}")]


def run_lines(config: Any, target: Target, account: MemoryAccount, data: str) -> list[tuple[str, str]]:
    """(name, text) of what the run does, on what, and for how long."""
    sequences = config.batch_size * config.gradient_accumulation_steps
    micro_steps = config.gradient_accumulation_steps // config.data_processes
    alias = f" (for {config.dry_run_gpu!r})" if config.dry_run_gpu not in (None, target.name) else ""
    power = f", {target.watts} W" if target.watts else ""
    return [
        ("run", f"{training_tokens(config):,} tokens: {config.max_iters:,} steps of {sequences:,} sequences of "
                f"{account.block_size:,}; batch_size {config.batch_size}, {micro_steps} micro-batches per step on each "
                "process"),
        ("data", data),
        ("device", f"{config.processes} × {target.name}{alias}: {human_bytes(target.memory)}{power}, "
                   f"{dtype_name(target.dtype)}"),
        ("reserved", f"{human_bytes(target.memory - target.budget)} ({RESERVE:.0%}: the device's context, "
                     f"workspaces, fragmentation), which leaves {human_bytes(target.budget)}"),
        ("time", time_text(config, target, account)),
    ]


def time_text(config: Any, target: Target, account: MemoryAccount) -> str:
    """How much time and energy the run takes, or why that is unknown."""
    if target.peak is None:
        return f"unknown: {target.peak_source}"
    flops = flops_per_token(account.model, account.block_size)["train"] * training_tokens(config)
    hours = flops / (target.peak * config.dry_run_mfu * config.processes) / 3600
    energy = (f"{target.watts * config.processes * hours / 1000:,.4g} kWh at {target.watts} W per GPU" if target.watts
              else "energy unknown")
    return (f"{hours:,.4g} hours ({hours / 24:,.3g} days) at {config.dry_run_mfu:.0%} MFU of "
            f"{target.peak / 1e12:,.4g} TFLOP/s ({target.peak_source}), {hours * config.processes:,.4g} device hours; "
            f"{energy}")


def table_lines(config: Any, rows: list[TableRow]) -> list[str]:
    """The table in GiB, one line per row. > marks the mode of the run."""
    attributes = [field.name for field in fields(MemoryNeed) if field.name != "frozen" or rows[0].need.frozen]
    columns = [name.replace("logits", "logits, loss") for name in attributes]
    table = [["", "GiB per process", *columns, "total", "fits", "largest"]]
    for row in rows:
        mark = ">" if (row.mode, row.checkpointing) == chosen_mode(config) else ""
        name = row.mode.name + (f", {row.checkpointing}" if row.checkpointing != "none" else "")
        sizes = [f"{size / 2**30:,.2f}" for size in (*(getattr(row.need, name) for name in attributes), row.need.total)]
        table.append([mark, name, *sizes, "yes" if row.fits else "no", str(row.largest or "none")])
    return [*align_columns(table, left=(0, 1)), ""]


def table_notes(config: Any, account: MemoryAccount) -> list[str]:
    """What a reader of the table must know."""
    lines = ["At the peak of a step with this batch_size. largest: the largest batch_size that fits, exactly.",
             "selective, full: activation_checkpointing. With one micro-batch per step, gradients are allocated while",
             "activations are freed, so the peak can come before there are any."]
    mode, _ = chosen_mode(config)
    if any(m.fsdp for m in parallel_modes(config)):
        lines.append("unsharded: an upper bound. FSDP's gradients are unsharded if a step has several micro-batches.")
    if mode.tp_size > 1:
        lines.append(f"TP{mode.tp_size}: an estimate, of a model with 1/{mode.tp_size} of the heads, of d_ff and of "
                     "the vocabulary's rows; the logits are not split.")
    if account.frozen_bytes:
        lines.append("frozen: the weights of companion models. Their forward passes are not in the estimated time.")
    if mode.cpu_offload and account.gpu:
        state = model_state(account, mode)
        lines.append(f"fsdp_cpu_offload: {human_bytes(state.parameters + state.gradients + state.optimizer)} of "
                     "parameters, gradients and optimizer state of each process are in the host's memory.")
    return lines


def verdict_lines(account: MemoryAccount, config: Any, target: Target, rows: list[TableRow],
                  row: TableRow) -> list[str]:
    """Whether the run fits, and how to change it if not.

    Args:
        rows: of the printed table.
        row: the one of the run.
    """
    text = (f"{mode_name(row)}, batch_size={config.batch_size} needs {human_bytes(row.need.total)} of "
            f"{human_bytes(target.budget)}")
    if row.fits:
        return [f"fits: {text}"]
    return [f"does not fit: {text}", advice(account, config, target.budget, rows)]
