"""What the kernels share: tensors as rows, and the shape of a launch. No Triton."""

import functools

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of inputs; every kernel computes in float32
MAX_WIDTH = 65536  # of a row that one program holds
INTERPRETER_PROGRAMS = 3  # of a persistent grid on a CPU, which has no multiprocessors


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (rows, C) with adjacent columns; rows may have any stride. A view where there is one."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def check_inputs(*tensors: torch.Tensor) -> None:
    """Raise `ValueError` for a dtype that the kernels do not compute, or rows that are too wide."""
    for t in tensors:
        if t.dtype not in DTYPES:
            raise ValueError(f"the Triton kernels take float32, bfloat16 and float16, not {t.dtype}")
        if t.shape[-1] > MAX_WIDTH:
            raise ValueError(f"the Triton kernels take rows of up to {MAX_WIDTH:,} elements, not {t.shape[-1]:,}")


def block_size(width: int) -> int:
    """The smallest power of two that holds a row: Triton's blocks are powers of two."""
    return 1 << (width - 1).bit_length() if width > 1 else 1


def warps(block: int) -> int:
    """Warps of a program on a block: 8 to 16 elements per thread, at most 32 warps, which is CUDA's limit."""
    return min(max(block // 512, 1), 32)


@functools.cache
def programs(device: torch.device) -> int:
    """Programs of a persistent grid: one for each multiprocessor."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
