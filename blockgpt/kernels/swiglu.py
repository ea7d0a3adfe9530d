"""The gates of SwiGLU, GEGLU and ReGLU in Triton. Shazeer 2020.

    y = a(g) u        ∂g = ∂y u a'(g)        ∂u = ∂y a(g)

    silu         a = g σ(g)                     a' = σ(g) (1 + g (1 - σ(g)))
    gelu         a = g Φ(g)                     a' = Φ(g) + g φ(g)
    gelu_tanh    a = g σ(2t), t = √(2/π) (g + 0.044715 g³)      a' = σ(2t) + 2 g t' σ(2t) (1 - σ(2t))
    relu         a = max(g, 0)                  a' = [g > 0]

σ is the logistic function, Φ and φ the normal distribution's function and density. Gate g and up-projection u are
saved; a(g), which plain PyTorch saves too, is computed again. They may be halves of one tensor: rows have any stride.
Importing this module imports Triton.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from blockgpt.kernels.rows import DTYPES, as_rows, block_size, warps

MAX_BLOCK = 1024  # columns of one program
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # the indices that the kernels know

# ---------------------------------------------------------------- kernels


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(a(g), a'(g))."""
    if ACTIVATION == 0:
        s = tl.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == 1:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == 2:
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        return g * s, s + g * 1.5957691216057308 * (1.0 + 0.134145 * g * g) * s * (1.0 - s)
    else:
        return tl.where(g < 0.0, 0.0, g), tl.where(g > 0.0, 1.0, 0.0)  # NaN stays NaN


@triton.jit
def gated_forward_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, width,  # type: ignore[no-untyped-def]
                         ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row."""
    row = tl.program_id(0).to(tl.int64)  # a tensor may have more than 2³¹ elements
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    a, _ = activate(gate, ACTIVATION)
    tl.store(y_ptr + row * width + columns, (a * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward_kernel(grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr,  # type: ignore[no-untyped-def]
                          grad_stride, gate_stride, up_stride, width, ACTIVATION: tl.constexpr,
                          BLOCK: tl.constexpr):
    """A block of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    a, slope = activate(gate, ACTIVATION)
    tl.store(grad_gate_ptr + row * width + columns, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + row * width + columns, (grad * a).to(grad_up_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launches


def launch_grid(rows: torch.Tensor) -> tuple[tuple[int, int], int]:
    """((rows, blocks of a row), columns of a block)."""
    block = min(block_size(rows.shape[1]), MAX_BLOCK)
    return (len(rows), triton.cdiv(rows.shape[1], block)), block


def launch_gated(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    """y, in the wider of the two dtypes."""
    for t in (gate, up):
        if t.dtype not in DTYPES:
            raise ValueError(f"the Triton kernels take float32, bfloat16 and float16, not {t.dtype}")
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    gates, ups = as_rows(gate), as_rows(up)
    if y.numel():
        grid, block = launch_grid(gates)
        gated_forward_kernel[grid](gates, ups, y, gates.stride(0), ups.stride(0), gate.shape[-1],
                                   ACTIVATION=activation, BLOCK=block, num_warps=warps(block))
    return y


def launch_gated_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor,
                          activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(∂g, ∂u)."""
    grad_gate, grad_up = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    grads, gates, ups = as_rows(grad), as_rows(gate), as_rows(up)
    if gate.numel():
        grid, block = launch_grid(gates)
        gated_backward_kernel[grid](grads, gates, ups, grad_gate, grad_up, grads.stride(0), gates.stride(0),
                                    ups.stride(0), gate.shape[-1], ACTIVATION=activation, BLOCK=block,
                                    num_warps=warps(block))
    return grad_gate, grad_up


# ---------------------------------------------------------------- registered operators


@torch.library.custom_op("blockgpt::gated", mutates_args=())
def gated_op(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    return launch_gated(gate, up, activation)


@gated_op.register_fake
def fake_gated(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)


@torch.library.custom_op("blockgpt::gated_backward", mutates_args=())
def gated_backward_op(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor,
                      activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_gated_backward(grad, gate, up, activation)


@gated_backward_op.register_fake
def fake_gated_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor,
                        activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    grad_gate, grad_up = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    return grad_gate, grad_up


def save_for_gated(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def differentiate_gated(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *gated_backward_op(grad, *ctx.saved_tensors, ctx.activation), None


gated_op.register_autograd(differentiate_gated, setup_context=save_for_gated)
for operator in ("gated", "gated_backward"):  # FLOPs are those of matrix products
    register_flop_formula(getattr(torch.ops.blockgpt, operator))(lambda *args, **kwargs: 0)


# ---------------------------------------------------------------- functions


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, (..., F) each. activation: a name in `ACTIVATIONS`."""
    y: torch.Tensor = gated_op(gate, up, ACTIVATIONS[activation])
    return y


def gated_torch(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`gated` in plain PyTorch."""
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    a = (F.silu(gate) if activation == "silu" else F.relu(gate) if activation == "relu"
         else F.gelu(gate, approximate=approximate))
    return a * up
