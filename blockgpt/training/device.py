"""Device and precision of this process."""

import os

import torch

from blockgpt.errors import ConfigError


def choose_device(name, local_rank):
    """The torch.device that `name` means here; `ConfigError` where it is not to be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError("device", f"{name!r} is unknown (one of auto, cpu, cuda, cuda:1, mps)")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device", f"{name!r}: torch sees no CUDA device here (--device=cpu)")
        processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > 1 and device.index is not None:
            raise ConfigError("device", f"{name!r} is one GPU for {processes} processes (--device=cuda: one for each)")
        if processes > count:  # told by every process, not by those alone that find none
            raise ConfigError("device", f"{name!r}: {processes} processes need as many GPUs, here are {count} "
                                        f"(torchrun --nproc_per_node={count})")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= count:
            raise ConfigError("device", f"{name!r} is not among the CUDA devices here, 0 to {count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device", "'mps': torch sees no Apple GPU here (--device=cpu)")
    return device


def choose_dtype(name, device):
    """The torch.dtype of the matrix products that `name` means on `device`."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ConfigError("dtype", "'bfloat16': this GPU has none (--dtype=float16)")
    if name == "float16" and device.type != "cuda":
        raise ConfigError("dtype", f"'float16' trains on CUDA alone, this is {device.type} (--dtype=bfloat16)")
    return getattr(torch, name)


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.runtime()


def process_memory():
    """{allocated, peak, reserved}: resident bytes of this process now and at their most."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        now = None
    return {"allocated": now, "peak": max(peak, now or 0), "reserved": None}  # the kernel counts the two apart
