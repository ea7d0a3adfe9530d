"""LayerNorm in Triton, with a bias or without. Ba et al. 2016.

    μ = mean(x)      r = 1 / sqrt(mean((x - μ)²) + eps)      x̂ = (x - μ) r      y = x̂ w + b

    ∂x = r (g - mean(g) - x̂ mean(g x̂))  with g = ∂y w          ∂w = Σ_rows ∂y x̂          ∂b = Σ_rows ∂y

The means are over the last dimension. Only the input, μ and r are saved, two float32 per row. The programs divide the
rows as those of rms_norm.py do. x and w may have different dtypes, y has that of x. Importing this module imports
Triton.
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
def layer_norm_forward_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,  # type: ignore[no-untyped-def]
                              x_stride, width, eps, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """One row: y, μ and r."""
    row = tl.program_id(0).to(tl.int64)  # a tensor may have more than 2³¹ elements
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    x = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    y = x * rstd * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(grad_y_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr,  # type: ignore[no-untyped-def]
                               grad_x_ptr, weight_sums_ptr, bias_sums_ptr, grad_y_stride, x_stride, rows, width,
                               BLOCK: tl.constexpr):
    """Every n-th row, of n programs: ∂x of each, and the sums of their ∂w and ∂b."""
    program, step = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    row = program.to(tl.int64)
    for _ in range(program, rows, step):
        rstd = tl.load(rstd_ptr + row)
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        x_hat = (x - tl.load(mean_ptr + row)) * rstd
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad_weight += grad_y * x_hat
        grad_bias += grad_y
        grad = grad_y * weight
        grad_x = rstd * (grad - tl.sum(grad, axis=0) / width - x_hat * (tl.sum(grad * x_hat, axis=0) / width))
        tl.store(grad_x_ptr + row * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        row += step
    offset = program.to(tl.int64) * width
    tl.store(weight_sums_ptr + offset + columns, grad_weight, mask=mask)
    tl.store(bias_sums_ptr + offset + columns, grad_bias, mask=mask)


# ---------------------------------------------------------------- registered operators, with their launches


@torch.library.custom_op("blockgpt::layer_norm", mutates_args=())
def layer_norm_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                  eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_inputs(x, weight)
    rows, width = as_rows(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(len(rows), dtype=torch.float32, device=x.device) for _ in range(2))
    if len(rows):
        block = block_size(width)
        layer_norm_forward_kernel[(len(rows),)](
            rows, weight.contiguous(), weight if bias is None else bias.contiguous(), y, mean, rstd, rows.stride(0),
            width, eps, HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps(block))
    return y, mean, rstd


@layer_norm_op.register_fake
def fake_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                    eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), mean, rstd


@torch.library.custom_op("blockgpt::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor,
                           rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(∂x, ∂w, ∂b); ∂b in float32."""
    rows, grads, width = as_rows(x), as_rows(grad_y), x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = min(programs(x.device), len(rows))
    weight_sums, bias_sums = (torch.empty(count, width, dtype=torch.float32, device=x.device) for _ in range(2))
    if count:
        block = block_size(width)
        layer_norm_backward_kernel[(count,)](
            grads, rows, weight.contiguous(), mean, rstd, grad_x, weight_sums, bias_sums, grads.stride(0),
            rows.stride(0), len(rows), width, BLOCK=block, num_warps=warps(block))
    return grad_x, weight_sums.sum(dim=0).to(weight.dtype), bias_sums.sum(dim=0)


@layer_norm_backward_op.register_fake
def fake_layer_norm_backward(grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor,
                             rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(weight.shape, dtype=weight.dtype, device=x.device),
            torch.empty(weight.shape, dtype=torch.float32, device=x.device))


def save_for_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def differentiate_layer_norm(ctx: Any, grad_y: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = layer_norm_backward_op(grad_y, *ctx.saved_tensors)
    return grad_x, grad_weight, None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype), None


layer_norm_op.register_autograd(differentiate_layer_norm, setup_context=save_for_layer_norm)
for operator in ("layer_norm", "layer_norm_backward"):  # FLOPs are those of matrix products
    register_flop_formula(getattr(torch.ops.blockgpt, operator))(lambda *args, **kwargs: 0)


# ---------------------------------------------------------------- functions


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """y of x (..., C), in x's dtype. weight, bias: (C,)."""
    y: torch.Tensor = layer_norm_op(x, weight, bias, eps)[0]
    return y


def layer_norm_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`layer_norm` in plain PyTorch."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
