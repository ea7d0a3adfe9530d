"""What one process of a run needs in memory, in every parallel mode."""

import dataclasses
import heapq
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class ParallelMode:
    """A way of sharing the training of one model.

    shards: how many processes hold the parts of one copy, of the optimizer's state (ZeRO-1) or of everything (FSDP).
    tensor: how many split each matrix; data: how many share the micro-batches of a step. reshards: whether FSDP frees a
    block between forward and backward pass; offloads: whether it keeps what is shared out in the host's memory.
    """

    name: str
    data: int = 1
    zero1: bool = False
    fsdp: bool = False
    shards: int = 1
    tensor: int = 1
    reshards: bool = True
    offloads: bool = False
SINGLE = ParallelMode("single")


def parallel_modes(config):
    """[`ParallelMode`] that the processes of the run could train in, from the simplest on."""
    processes, data = config.processes, config.data_processes
    fsdp = ParallelMode("FSDP", data, fsdp=True, shards=max(1, data // config.dp_replicate),
                reshards=config.fsdp_reshard_after_forward, offloads=config.fsdp_cpu_offload)
    if config.tensor_parallel > 1:
        name = f"TP{config.tensor_parallel}"
        alone = [ParallelMode(name, tensor=config.tensor_parallel)] if data == 1 else []
        return [*alone, dataclasses.replace(fsdp, name=f"FSDP × {name}", tensor=config.tensor_parallel)]
    shared = [ParallelMode("DDP", data), ParallelMode("ZeRO-1", data, zero1=True, shards=data)] if processes > 1 else []
    return [SINGLE, *shared, *([fsdp] if processes > 1 or config.use_fsdp else [])]


def chosen_mode(config):
    """(the `ParallelMode` of the run, its kind of activation checkpointing)."""
    able = parallel_modes(config)
    if config.use_fsdp:
        mode = able[-1]
    else:
        mode = next((m for m in able if m.zero1 == config.use_zero1 and not m.fsdp and m.data == config.data_processes),
                    able[0])
    return mode, config.activation_checkpointing


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one process holds on its device at the fullest moment of a step; the fields add up to `total`.

    gathered: what FSDP puts together of parameters and gradients, on top of the process's own parts. activations,
    logits: what is saved, and what the work of that moment takes beside it (logits: in the head and the loss).
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


def memory_need(account, mode, checkpointing, sequences, accumulating):
    """The `MemoryNeed` of the fullest process of a `ParallelMode` for micro-batches of `sequences`.

    account: a `MemoryAccount` of the model, or of a process's part of it: see `part_of_model`. checkpointing: a kind of
    `blockgpt.training.recompute.CHECKPOINTING_MODES`. accumulating: whether a process takes several micro-batches a step. DDP's and ZeRO-1's
    gradients outlive the step; FSDP's are whole from the first micro-batch to the last, which alone shares them out.
    """
    state = state_of(account, mode)
    keeps = accumulating or (mode.data > 1 and not mode.fsdp)
    moments = account.moments(sequences, checkpointing, accumulating=keeps, copies=not mode.fsdp)
    whole = state.whole if mode.fsdp else state.gradients
    held = [(whole if keeps else -(-made * state.gradients // (account.gradient_bytes or 1)),
             gathered_bytes(account, mode, accumulating, among_blocks=i > 1) if mode.fsdp else 0, *rest)
            for i, (made, *rest) in enumerate(moments)]  # the first two are the forward pass and the head
    gradients, gathered, activations, logits = max(held, key=sum)
    if mode.offloads and account.gpu:
        return MemoryNeed(0, gradients if keeps else 0, 0, gathered, activations, logits)
    return MemoryNeed(state.parameters, gradients, state.optimizer, gathered, activations, logits)


@dataclass(frozen=True)
class State:
    """Bytes that the fullest process of a mode holds; whole: of gradients before FSDP shares them out."""

    parameters: int
    gradients: int
    optimizer: int
    whole: int


@lru_cache(maxsize=64)
def state_of(account, mode):
    """The `State` of a process.

    FSDP splits each parameter's first dimension, the first process has the most of it. Tensor parallelism splits the
    rows of embedding and head; the account is already that of a part of the other matrices.
    """
    of_tokens = {account.model.token_embedding.weight, account.model.lm_head.weight}
    shards, parts = mode.shards if mode.fsdp else 1, {}
    for p, size in account.sizes.items():
        rows = -(-len(p) // mode.tensor) if p in of_tokens else len(p)
        parts[p] = size // len(p) * -(-rows // shards), size // len(p) * rows
    trained = [p for p in parts if p.requires_grad]
    states = [2 * parts[p][0] + 4 for p in trained]
    optimizer = most_owned(account, mode.shards) if mode.zero1 else sum(states)
    return State(sum(own for own, _ in parts.values()), sum(parts[p][0] for p in trained), optimizer,
                 sum(parts[p][1] for p in trained))


def most_owned(account, processes):
    """Bytes of optimizer state of the process to which ZeRO-1 gives the most.

    torch's ZeroRedundancyOptimizer gives whole parameters away, group by group (`build_optimizer`) and in each the
    largest first, to the process that has the fewest numbers so far.
    """
    multipliers = account.model.lr_multipliers()
    trained = [(p.dim() < 2, multipliers[name], -p.numel(), account.sizes[p])
               for name, p in account.model.named_parameters() if p.requires_grad]
    owners = [(0, rank, 0) for rank in range(min(processes, len(trained)))]  # numbers, rank, bytes of state
    for *_, numbers, size in sorted(trained, key=lambda entry: entry[:3]):
        own, rank, held = owners[0]
        heapq.heapreplace(owners, (own - numbers, rank, held + 2 * size + 4))
    return max((held for *_, held in owners), default=0)


def gathered_bytes(account, mode, accumulating, among_blocks):
    """What FSDP holds whole in the forward pass and at the head, or on the way back through the blocks; from above.

    Each block is a group, computed in the precision of the products while the next comes in; the rest of the model is
    one in float32, together from the first moment to the last. On the way back one block's gradients go out in float32,
    and those of the head wait for the embeddings'. Other gradients are counted with the work of their moment or, where
    steps are several micro-batches, as `MemoryNeed.gradients`.
    """
    def cast(size):
        return size * account.dtype.itemsize // torch.float32.itemsize

    blocks = sorted(block.parameters for block in account.blocks)
    rest = state_of(account, dataclasses.replace(mode, shards=1)).parameters - sum(blocks)
    weights = rest + cast(sum(blocks[-2:] if mode.reshards else blocks))
    if not among_blocks:
        return weights
    return weights + blocks[-1] + (cast(blocks[-1]) if accumulating else account.head_parameters)


def part_of_model(model, tensor):
    """The `ModelConfig` of what one of `tensor` tensor-parallel neighbours computes: its heads, its share of d_ff."""
    whole = model.resolve()
    return dataclasses.replace(whole, n_head=whole.n_head // tensor, n_kv_head=whole.n_kv_head // tensor,
                               head_dim=whole.head_dim, d_ff=whole.d_ff // tensor)
