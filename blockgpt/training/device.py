"""The device of this process, its precision, and the memory that it uses.

A device type is added in `choose_device`, its precisions in `choose_dtype`, its memory in `Runtime.memory`.
"""

import errno
import os
import platform
import resource
import sys

import torch

from blockgpt.errors import ConfigError


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of this process.

    Args:
        name: the key `device`: auto, cpu, cuda, cuda:N or mps.
        local_rank: the rank among the processes of this host, which picks the GPU.

    Raises:
        ConfigError: the name is unknown, or this host does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError("device", f"{name!r} is unknown (one of auto, cpu, cuda, cuda:1, mps)")
    if device.type == "cuda":
        return choose_gpu(name, device.index, local_rank)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device", "'mps': torch finds no Apple GPU (--device=cpu)")
    return device


def choose_gpu(name: str, index: int | None, local_rank: int) -> torch.device:
    """CUDA device `index`, or without one that of `local_rank`; raises `ConfigError` if it does not exist."""
    if not torch.cuda.is_available():
        raise ConfigError("device", f"{name!r}: torch finds no CUDA device (--device=cpu)")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > 1 and index is not None:
        raise ConfigError("device", f"{name!r} is one GPU for {processes} processes (--device=cuda gives each its own)")
    if processes > gpus:  # an error on every process, not only on those without a GPU
        raise ConfigError("device", f"{name!r}: {processes} processes need {processes} GPUs, this host has {gpus} "
                                    f"(torchrun --nproc_per_node={gpus})")
    device = torch.device("cuda", local_rank if index is None else index)
    if device.index >= gpus:
        raise ConfigError("device", f"{name!r} does not exist, this host has CUDA devices 0 to {gpus - 1}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products.

    Args:
        name: the key `dtype`: auto, float32, bfloat16 or float16.
        device: that of this process.

    Raises:
        ConfigError: `device` does not support it.
    """
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and has_bfloat16 else "float32"
    if name == "bfloat16" and not has_bfloat16:
        raise ConfigError("dtype", "'bfloat16' is not supported by this GPU (--dtype=float16)")
    if name == "float16" and device.type != "cuda":
        raise ConfigError("dtype", f"'float16' needs a CUDA device, this is {device.type} (--dtype=bfloat16)")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def process_memory() -> dict[str, int | None]:
    """{allocated, peak, reserved}: resident bytes of this process, now and at the peak; a CPU has no reserved ones."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        return {"allocated": None, "peak": peak, "reserved": None}
    return {"allocated": now, "peak": max(peak, now), "reserved": None}  # the kernel counts the two separately


OUT_OF_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device or the host has no memory left.

    CUDA has torch.OutOfMemoryError, numpy MemoryError, the system an errno. torch's other allocators and libraries
    raise a RuntimeError.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY))
