"""The memory that one process of a run needs, in every parallel mode.

`MemoryAccount` gives the memory of one process that holds the whole model. This module divides it: which bytes are
sharded over how many processes. To add a parallel mode: a `ParallelMode` in `parallel_modes`, and what it shards in
`memory_need` and `model_state`.
"""

import dataclasses
import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from blockgpt.accounting.memory import MemoryAccount, PhaseBytes, adamw_bytes


@dataclass(frozen=True)
class ParallelMode:
    """A way of training one model on several processes.

    Attributes:
        name: as printed.
        dp_size: processes that share the micro-batches of a step.
        zero1: whether the optimizer state is sharded (ZeRO-1).
        fsdp: whether parameters, gradients and optimizer state are sharded (FSDP).
        shards: processes over which one copy of the model's state is sharded.
        tp_size: processes that split each matrix.
        reshard_after_forward: whether FSDP frees the full weights of a block between forward and backward pass.
        cpu_offload: whether FSDP keeps its shards in the host's memory.
    """

    name: str
    dp_size: int = 1
    zero1: bool = False
    fsdp: bool = False
    shards: int = 1
    tp_size: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False


SINGLE = ParallelMode("single")


def parallel_modes(config: Any) -> list[ParallelMode]:
    """The modes that the processes of the run `config` can train in, the simplest first."""
    processes, dp_size, tp_size = config.processes, config.data_processes, config.tensor_parallel
    fsdp = ParallelMode("FSDP", dp_size, fsdp=True, shards=max(1, dp_size // config.dp_replicate),
                        reshard_after_forward=config.fsdp_reshard_after_forward, cpu_offload=config.fsdp_cpu_offload)
    if tp_size > 1:
        only_tp = [ParallelMode(f"TP{tp_size}", tp_size=tp_size)] if dp_size == 1 else []
        return [*only_tp, dataclasses.replace(fsdp, name=f"FSDP × TP{tp_size}", tp_size=tp_size)]
    if processes == 1:
        return [SINGLE, fsdp] if config.use_fsdp else [SINGLE]
    return [SINGLE, ParallelMode("DDP", dp_size), ParallelMode("ZeRO-1", dp_size, zero1=True, shards=dp_size), fsdp]


def chosen_mode(config: Any) -> tuple[ParallelMode, str]:
    """(the mode of a run, its activation checkpointing mode)."""
    modes = parallel_modes(config)
    wanted = (config.use_zero1, config.data_processes)
    without_fsdp = (mode for mode in modes if not mode.fsdp and (mode.zero1, mode.dp_size) == wanted)
    return modes[-1] if config.use_fsdp else next(without_fsdp, modes[0]), config.activation_checkpointing


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one process holds on its device at the peak of a step. The fields add up to `total`.

    Attributes:
        parameters: the process's own shard, as are `gradients` (see `memory_need`) and `optimizer`.
        unsharded: parameters and gradients that FSDP holds in full, in addition to the process's own shard.
        activations: what is saved for the backward pass, and temporary tensors of the blocks.
        logits: temporary tensors of the head and the loss.
        frozen: the weights of frozen companion models, or the process's shard of them.
    """

    parameters: int
    gradients: int
    optimizer: int
    unsharded: int
    activations: int
    logits: int
    frozen: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def memory_need(account: MemoryAccount, mode: ParallelMode, checkpointing: str, sequences: int,
                accumulating: bool) -> MemoryNeed:
    """The memory of the process that needs the most.

    DDP and ZeRO-1 keep the gradients from step to step. FSDP holds them unsharded from the first micro-batch to the
    last one, which reduces them.

    Args:
        account: of the model, or of one process's part of it (`tensor_parallel_config`).
        mode: how the model is trained.
        checkpointing: a key of `blockgpt.training.recompute.CHECKPOINTING_MODES`.
        sequences: of a micro-batch.
        accumulating: whether a process computes several micro-batches per step.
    """
    state = model_state(account, mode)
    gradients_persist = accumulating or (mode.dp_size > 1 and not mode.fsdp)
    all_gradients = state.unsharded_gradients if mode.fsdp else state.gradients

    def need(phase: PhaseBytes) -> MemoryNeed:
        gradients = all_gradients if gradients_persist else ceil_div(phase.gradients * state.gradients,
                                                                     account.gradient_bytes or 1)
        in_blocks = phase.phase not in ("forward", "head")
        unsharded = unsharded_bytes(account, mode, accumulating, in_blocks) if mode.fsdp else 0
        return MemoryNeed(state.parameters, gradients, state.optimizer, unsharded, phase.activations, phase.logits,
                          ceil_div(account.frozen_bytes, mode.shards if mode.fsdp else 1))

    phases = account.phases(sequences, checkpointing, accumulating=gradients_persist, weight_copies=not mode.fsdp)
    peak = max(map(need, phases), key=lambda need: need.total)
    if mode.cpu_offload and account.gpu:
        gradients = peak.gradients if gradients_persist else 0
        return dataclasses.replace(peak, parameters=0, gradients=gradients, optimizer=0, frozen=0)
    return peak


@dataclass(frozen=True)
class ModelState:
    """Bytes that exist between steps, of the process that holds the most.

    Attributes:
        unsharded_gradients: all gradients, before FSDP reduces and shards them.
    """

    parameters: int
    gradients: int
    optimizer: int
    unsharded_gradients: int


@lru_cache(maxsize=64)
def model_state(account: MemoryAccount, mode: ParallelMode) -> ModelState:
    """The state of the process that holds the most.

    FSDP splits the first dimension of each parameter; the first process has the largest shard. Tensor parallelism
    splits the rows of embedding and head; `account` is already that of one process's part of the other matrices.
    """
    by_vocabulary = {account.model.get_submodule(name).weight for name in ("token_embedding", "lm_head")}
    unsharded, own = {}, {}
    for p, size in account.parameter_sizes.items():
        row_bytes = size // len(p)
        rows = ceil_div(len(p), mode.tp_size) if p in by_vocabulary else len(p)
        unsharded[p] = row_bytes * rows
        own[p] = row_bytes * ceil_div(rows, mode.shards if mode.fsdp else 1)
    trained = [p for p in own if p.requires_grad]
    optimizer = zero1_optimizer_bytes(account, mode.shards) if mode.zero1 else sum(adamw_bytes(own[p]) for p in trained)
    return ModelState(sum(own.values()), sum(own[p] for p in trained), optimizer, sum(unsharded[p] for p in trained))


def zero1_optimizer_bytes(account: MemoryAccount, processes: int) -> int:
    """Bytes of optimizer state of the process to which ZeRO-1 assigns the most.

    torch's ZeroRedundancyOptimizer goes through the parameter groups (`build_optimizer`), each from its largest
    parameter to its smallest. It assigns a whole parameter to the process that has the fewest elements so far.
    """
    lr_multipliers: dict[str, float] = account.model.lr_multipliers()  # type: ignore[operator] # a method of the GPT
    trained = [(p.dim() < 2, lr_multipliers[name], -p.numel(), account.parameter_sizes[p])
               for name, p in account.model.named_parameters() if p.requires_grad]
    processes_by_load = [(0, rank, 0) for rank in range(min(processes, len(trained)))]  # (elements, rank, state bytes)
    for *_, negative_elements, size in sorted(trained, key=lambda entry: entry[:3]):
        elements, rank, state_bytes = processes_by_load[0]
        heapq.heapreplace(processes_by_load, (elements - negative_elements, rank, state_bytes + adamw_bytes(size)))
    return max((state_bytes for *_, state_bytes in processes_by_load), default=0)


def unsharded_bytes(account: MemoryAccount, mode: ParallelMode, accumulating: bool, in_blocks: bool) -> int:
    """An upper bound of what FSDP holds unsharded.

    Each block is a group, computed in the precision of the matrix products while the next block is all-gathered. The
    rest of the model is one group in float32, which is unsharded during the whole step. In the backward pass, the
    gradients of one block are reduced in float32, and those of the head wait for those of the embeddings. Other
    gradients are counted as temporary tensors or, with several micro-batches per step, as `MemoryNeed.gradients`.

    Args:
        account: of the model.
        mode: an FSDP mode.
        accumulating: whether a process computes several micro-batches per step.
        in_blocks: whether the backward pass has reached the blocks.
    """
    def low_precision(size: int) -> int:
        return size * account.dtype.itemsize // torch.float32.itemsize

    blocks = sorted(block.parameters for block in account.blocks)
    outside_blocks = model_state(account, dataclasses.replace(mode, shards=1)).parameters - sum(blocks)
    weights = outside_blocks + low_precision(sum(blocks[-2:] if mode.reshard_after_forward else blocks))
    if not in_blocks:
        return weights
    return weights + blocks[-1] + (low_precision(blocks[-1]) if accumulating else account.head_parameters)


def tensor_parallel_config(model_config: Any, tp_size: int) -> Any:
    """The model configuration of what one of `tp_size` processes computes: 1/tp_size of the heads and of d_ff."""
    full = model_config.resolve()
    return dataclasses.replace(full, n_head=full.n_head // tp_size, n_kv_head=full.n_kv_head // tp_size,
                               head_dim=full.head_dim, d_ff=full.d_ff // tp_size)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
