"""RMSNorm in Triton, alone or with the addition to the residual stream before it. Zhang & Sennrich 2019.

    r = 1 / sqrt(mean(x²) + eps)      x̂ = x r      y = x̂ (w + offset)

    ∂x = r (g - x̂ mean(g x̂))  with g = ∂y (w + offset)          ∂w = Σ_rows ∂y x̂

The mean is over the last dimension. offset is 1 for Gemma's RMSNorm, else 0. With a residual, x = a + b is computed,
rounded to the result's dtype and returned too, and ∂a = ∂b = ∂x + the gradient of that sum.

Only the input and r, one float32 per row, are saved. One program normalises a row. In the backward pass there are as
many programs as multiprocessors; each goes through its rows, sums ∂w of them in registers and writes one partial sum;
the partial sums are added at the end, always in the same order. x and w may have different dtypes, y has that of x.
Importing this module imports Triton.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from blockgpt.kernels.rows import as_rows, block_size, check_inputs, programs, warps

# ---------------------------------------------------------------- kernels


@triton.jit
def rms_norm_forward_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,  # type: ignore[no-untyped-def]
                            x_stride, residual_stride, width, eps, offset, HAS_RESIDUAL: tl.constexpr,
                            BLOCK: tl.constexpr):
    """One row: y and r, and with a residual the sum."""
    row = tl.program_id(0).to(tl.int64)  # a tensor may have more than 2³¹ elements
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + row * width + columns, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(grad_y_ptr, grad_sum_ptr, x_ptr, weight_ptr, rstd_ptr,  # type: ignore[no-untyped-def]
                             grad_x_ptr, partial_ptr, grad_y_stride, grad_sum_stride, x_stride, rows, width, offset,
                             HAS_GRAD_SUM: tl.constexpr, BLOCK: tl.constexpr):
    """Every n-th row, of n programs: ∂x of each, and the sum of their ∂w."""
    program, step = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + offset
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    row = program.to(tl.int64)
    for _ in range(program, rows, step):
        x_hat = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        x_hat *= rstd
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad_weight += grad_y * x_hat
        grad = grad_y * weight
        grad_x = rstd * (grad - x_hat * (tl.sum(grad * x_hat, axis=0) / width))
        if HAS_GRAD_SUM:
            grad_x += tl.load(grad_sum_ptr + row * grad_sum_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        row += step
    tl.store(partial_ptr + program.to(tl.int64) * width + columns, grad_weight, mask=mask)


# ---------------------------------------------------------------- launches


def launch_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
                    offset: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, the sum, r); without a residual the sum is empty."""
    check_inputs(x, weight)
    rows, width = as_rows(x), x.shape[-1]
    others = None if residual is None else as_rows(residual)
    dtype = x.dtype if residual is None else sum_dtype(x, residual)
    y, total = (torch.empty(shape, dtype=dtype, device=x.device)
                for shape in (x.shape, (0,) if residual is None else x.shape))
    rstd = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    if len(rows):
        block = block_size(width)
        rms_norm_forward_kernel[(len(rows),)](
            rows, rows if others is None else others, weight.contiguous(), y, total, rstd, rows.stride(0),
            0 if others is None else others.stride(0), width, eps, offset, HAS_RESIDUAL=others is not None,
            BLOCK=block, num_warps=warps(block))
    return y, total, rstd


def launch_rms_norm_backward(grad_y: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor,
                             weight: torch.Tensor, rstd: torch.Tensor,
                             offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(∂x, ∂w)."""
    rows, grads, width = as_rows(x), as_rows(grad_y), x.shape[-1]
    sums = None if grad_sum is None else as_rows(grad_sum)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = min(programs(x.device), len(rows))
    partial = torch.empty(count, width, dtype=torch.float32, device=x.device)
    if count:
        block = block_size(width)
        rms_norm_backward_kernel[(count,)](
            grads, grads if sums is None else sums, rows, weight.contiguous(), rstd, grad_x, partial, grads.stride(0),
            0 if sums is None else sums.stride(0), rows.stride(0), len(rows), width, offset,
            HAS_GRAD_SUM=sums is not None, BLOCK=block, num_warps=warps(block))
    return grad_x, partial.sum(dim=0).to(weight.dtype)


def sum_dtype(x: torch.Tensor, residual: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, residual.dtype)


# ---------------------------------------------------------------- registered operators


@torch.library.custom_op("blockgpt::rms_norm", mutates_args=())
def rms_norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = launch_rms_norm(x, None, weight, eps, offset)
    return y, rstd


@rms_norm_op.register_fake
def fake_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float,
                  offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32))


@torch.library.custom_op("blockgpt::add_rms_norm", mutates_args=())
def add_rms_norm_op(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                    offset: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_rms_norm(x, residual, weight, eps, offset)


@add_rms_norm_op.register_fake
def fake_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                      offset: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, total = (torch.empty(x.shape, dtype=sum_dtype(x, residual), device=x.device) for _ in range(2))
    return y, total, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("blockgpt::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(grad_y: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor,
                         rstd: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_rms_norm_backward(grad_y, grad_sum, x, weight, rstd, offset)


@rms_norm_backward_op.register_fake
def fake_rms_norm_backward(grad_y: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor,
                           rstd: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(weight.shape, dtype=weight.dtype, device=x.device))


def save_for_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def differentiate_rms_norm(ctx: Any, grad_y: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    return *rms_norm_backward_op(grad_y, None, x, weight, rstd, ctx.offset), None, None


def save_for_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, _, ctx.offset = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, output[2])  # the sum, which the stream holds anyway
    ctx.mark_non_differentiable(output[2])


def differentiate_add_rms_norm(ctx: Any, grad_y: torch.Tensor, grad_sum: torch.Tensor,
                               _: Any) -> tuple[torch.Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    grad, grad_weight = rms_norm_backward_op(grad_y, grad_sum, total, weight, rstd, ctx.offset)
    return *(grad.to(dtype) for dtype in ctx.dtypes), grad_weight, None, None


rms_norm_op.register_autograd(differentiate_rms_norm, setup_context=save_for_rms_norm)
add_rms_norm_op.register_autograd(differentiate_add_rms_norm, setup_context=save_for_add_rms_norm)
for operator in ("rms_norm", "add_rms_norm", "rms_norm_backward"):
    # FLOPs are those of matrix products.
    register_flop_formula(getattr(torch.ops.blockgpt, operator))(lambda *args, **kwargs: 0)


# ---------------------------------------------------------------- functions


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """y of x (..., C), in x's dtype. weight: (C,)."""
    y: torch.Tensor = rms_norm_op(x, weight, eps, offset)[0]
    return y


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                 offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual, its norm), (..., C) each, in the wider of the two dtypes. weight: (C,)."""
    y, total, _ = add_rms_norm_op(x, residual, weight, eps, offset)
    return total, y


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """`rms_norm` in plain PyTorch."""
    return F.rms_norm(x, x.shape[-1:], (weight + offset if offset else weight).to(x.dtype), eps)


def add_rms_norm_torch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                       offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in plain PyTorch."""
    total = x + residual
    return total, rms_norm_torch(total, weight, eps, offset)
