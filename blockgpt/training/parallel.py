"""The machine under a run: processes, device, precision, compilation. Under torchrun: DDP."""

import contextlib
import random

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from blockgpt.training.recompute import recompute


def parameter_device(config, runtime):
    """The device on which the weights lie."""
    return torch.device("cpu") if config.use_fsdp and config.fsdp_cpu_offload else runtime.device


def parallelize(model, config, runtime):
    """Prepare a model on the meta device for `runtime`, before it gets storage: each process then holds its part alone.

    Activation checkpointing, tensor parallelism, FSDP; what is left (compilation, DDP) is `wrap`'s.
    """
    recompute(model, config.activation_checkpointing)
    if config.use_fsdp or runtime.tp_size > 1:
        from blockgpt.training.sharding import shard_model  # a second to import, which no other run pays for

        shard_model(model, config, runtime)


def wrap(model, config, runtime):
    """The module to call: compiled, and under several processes DDP, unless `parallelize` has done it all.

    Weights are read from the plain one.
    """
    if config.use_fsdp or runtime.tp_size > 1:
        return model
    wrapped = torch.compile(model) if runtime.compile else model
    if runtime.world_size > 1:
        ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True)  # else held twice
    return wrapped


@contextlib.contextmanager
def gradient_sync(wrapped, now):
    """A context in which the backward pass averages gradients over the processes only if `now`."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP
        wrapped.set_requires_gradient_sync(now)
    with contextlib.nullcontext() if now or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
        yield


def parallel_mode(config, runtime):
    """How the processes share the work, in words."""
    if not dist.is_initialized():
        return "single"
    parts = ["FSDP" if config.use_fsdp else "ZeRO-1" if config.use_zero1 else "DDP" if runtime.dp_size > 1 else ""]
    if runtime.tp_size > 1:
        parts.append(f"TP{runtime.tp_size}")
    return " × ".join(p for p in parts if p) or "single"


def seed_micro_batch(seed, step, number):
    """Seed dropout as a function of (seed, step, the micro-batch's number in the step): no generator to save.

    The number counts over all processes, so that another number of them draws the same.
    """
    torch.manual_seed(random.Random(f"{seed} {step} {number}").getrandbits(63))


