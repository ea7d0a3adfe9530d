"""How a model runs on several processes: DDP, FSDP, tensor parallelism; and activation checkpointing.

`parallelize` prepares the model while it has no storage, so that each process allocates its own shards only; `wrap`
makes the module to call. A mode that shards the model goes into training/sharding.py and is called by `parallelize`.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from blockgpt.training.launch import Runtime
from blockgpt.training.recompute import recompute


def parameter_device(config: Any, runtime: Runtime) -> torch.device:
    """The device of the parameters."""
    return torch.device("cpu") if config.use_fsdp and config.fsdp_cpu_offload else runtime.device


def parallelize(model: Any, config: Any, runtime: Runtime) -> None:
    """Apply activation checkpointing, tensor parallelism and FSDP to a model on the meta device.

    Compilation and DDP follow in `wrap`.
    """
    recompute(model, config.activation_checkpointing)
    if config.use_fsdp or runtime.tp_size > 1:
        from blockgpt.training.sharding import shard_model  # its import takes a second, which other runs save

        shard_model(model, config, runtime)


def wrap(model: nn.Module, config: Any, runtime: Runtime) -> nn.Module:
    """The module to call: compiled, and with several processes DDP, unless `parallelize` has sharded the model.

    Read parameters and their names from `model`: the wrappers change the names.
    """
    if config.model.kernels == "auto" and runtime.device.type == "cuda" and runtime.tp_size == 1:
        from blockgpt.kernels.choose import choose_kernels  # other devices have nothing to choose from

        choose_kernels(model, config, runtime)
    if config.use_fsdp or runtime.tp_size > 1:
        return model
    wrapped: Any = torch.compile(model) if runtime.compile else model
    if runtime.world_size > 1:
        device_ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        # Without the views, gradients would take twice their memory.
        wrapped = DistributedDataParallel(wrapped, device_ids=device_ids, gradient_as_bucket_view=True)
    return wrapped


@contextlib.contextmanager
def gradient_sync(wrapped: Any, now: bool) -> Iterator[None]:
    """A context whose backward pass averages the gradients over the processes if `now`, and else accumulates them."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP
        wrapped.set_requires_gradient_sync(now)
    with contextlib.nullcontext() if now or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
        yield


def parallel_mode(config: Any, runtime: Runtime) -> str:
    """The parallelism of the run, such as 'FSDP × TP2'; 'single' for one process."""
    if not dist.is_initialized():
        return "single"
    data_parallel = ("FSDP" if config.use_fsdp else "ZeRO-1" if config.use_zero1 else
                     "DDP" if runtime.dp_size > 1 else "")
    tensor_parallel = f"TP{runtime.tp_size}" if runtime.tp_size > 1 else ""
    return " × ".join(mode for mode in (data_parallel, tensor_parallel) if mode) or "single"


def seed_micro_batch(seed: int, step: int, micro_step: int, runtime: Runtime) -> None:
    """Seed dropout from (seed, step, micro-batch of the step), so that a resumed run needs no generator state.

    The micro-batches are counted over all processes, so that another number of processes draws the same values.
    """
    index = micro_step * runtime.dp_size + runtime.dp_rank
    on_cpu = runtime.device.type == "cpu"
    seeder: Any = torch.default_generator if on_cpu else torch  # torch.manual_seed formats a stack trace, for 0.4 ms
    seeder.manual_seed(random.Random(f"{seed} {step} {index}").getrandbits(63))
