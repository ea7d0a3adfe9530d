"""The machine under a run: processes, device, precision, compilation. Under torchrun: DDP."""

import contextlib
import random

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from blockgpt.training.recompute import recompute


def home(config, machine):
    """The device on which the weights lie."""
    return torch.device("cpu") if config.use_fsdp and config.fsdp_cpu_offload else machine.device


def distribute(model, config, machine):
    """Prepare a model on the meta device for `machine`, before it gets storage: each process then holds its part alone.

    Activation checkpointing, tensor parallelism, FSDP; what is left (compilation, DDP) is `wrap`'s.
    """
    recompute(model, config.activation_checkpointing)
    if config.use_fsdp or machine.tensor_parallel > 1:
        from blockgpt.training.sharding import part  # a second to import, which no other run pays for

        part(model, config, machine)


def wrap(model, config, machine):
    """The module to call: compiled, and under several processes DDP, unless `distribute` has done it all.

    Weights are read from the plain one.
    """
    if config.use_fsdp or machine.tensor_parallel > 1:
        return model
    wrapped = torch.compile(model) if machine.compile else model
    if machine.world_size > 1:
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True)  # else held twice
    return wrapped


@contextlib.contextmanager
def synchronise_gradients(wrapped, now):
    """A context in which the backward pass averages gradients over the processes only if `now`."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP
        wrapped.set_requires_gradient_sync(now)
    with contextlib.nullcontext() if now or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
        yield


def mode(config, machine):
    """How the processes share the work, in words."""
    if not dist.is_initialized():
        return "single"
    parts = ["FSDP" if config.use_fsdp else "ZeRO-1" if config.use_zero1 else "DDP" if machine.data_size > 1 else ""]
    if machine.tensor_parallel > 1:
        parts.append(f"TP{machine.tensor_parallel}")
    return " × ".join(p for p in parts if p) or "single"


def seed_micro_batch(seed, step, number):
    """Seed dropout as a function of (seed, step, the micro-batch's number in the step): no generator to save.

    The number counts over all processes, so that another number of them draws the same.
    """
    torch.manual_seed(random.Random(f"{seed} {step} {number}").getrandbits(63))


