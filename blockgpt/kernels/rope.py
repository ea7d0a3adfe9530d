"""RoPE of queries and keys in one pass in Triton, after an RMSNorm of each head on request. Su et al. 2021.

    y_i = n_i cos_i - n_{i + R/2} sin_i      y_{i + R/2} = n_{i + R/2} cos_i + n_i sin_i      i < R/2
    y_i = n_i                                                                                 i ≥ R
    n = x, or x̂ (w + offset) with x̂ = x r and r = 1 / sqrt(mean(x²) + eps) over the head's D channels

    ∂n is ∂y rotated by -sin.      ∂x = ∂n, or r (g - x̂ mean(g x̂)) with g = ∂n (w + offset), and ∂w = Σ ∂n x̂

One program has a token: it reads cos and sin once, for all heads of q and of k, which may have fewer. Nothing of q and
k is saved without a norm; with one, they and a float32 per head. Arithmetic is in float32, also of cos and sin, which
plain PyTorch rounds to the dtype of q. Importing this module imports Triton.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from blockgpt.kernels.rows import block_size, check_inputs, programs, warps

# ---------------------------------------------------------------- kernels


@triton.jit
def rotation(cos_ptr, sin_ptr, t, half, columns):  # type: ignore[no-untyped-def]
    """(cos, signed sin, the column that each is paired with) of a token."""
    rotated = columns < 2 * half
    pair = tl.where(columns < half, columns, columns - half)
    cos = tl.load(cos_ptr + t * half + pair, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * half + pair, mask=rotated, other=0.0).to(tl.float32)
    partner = tl.where(columns < half, columns + half, tl.where(rotated, columns - half, columns))
    return cos, tl.where(columns < half, -sin, sin), partner


@triton.jit
def rotate_heads(x_ptr, y_ptr, rstd_ptr, weight_ptr, cos, sin, partner, token, head_stride,  # type: ignore
                 heads, width, length, eps, offset, columns, HAS_NORM: tl.constexpr):
    """All heads of a token of q or k; x_ptr is the token's. y and r are (B, heads, T, …)."""
    mask = columns < width
    if HAS_NORM:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + offset
        other_weight = tl.load(weight_ptr + partner, mask=mask, other=0.0).to(tl.float32) + offset
    row = (token // length) * heads * length + token % length
    for _ in range(heads):
        x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(x_ptr + partner, mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
            tl.store(rstd_ptr + row, rstd)
            x *= rstd * weight
            other *= rstd * other_weight
        tl.store(y_ptr + row * width + columns, (x * cos + other * sin).to(y_ptr.dtype.element_ty), mask=mask)
        x_ptr += head_stride
        row += length


@triton.jit
def rope_forward_kernel(q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,  # type: ignore[no-untyped-def]
                        q_out_ptr, k_out_ptr, q_rstd_ptr, k_rstd_ptr, q_batch, q_head, q_time, k_batch, k_head, k_time,
                        q_heads, k_heads, length, width, half, eps, offset, HAS_NORM: tl.constexpr,
                        BLOCK: tl.constexpr):
    """One token: all heads of q and of k."""
    token = tl.program_id(0).to(tl.int64)  # a tensor may have more than 2³¹ elements
    columns = tl.arange(0, BLOCK)
    b, t = token // length, token % length
    cos, sin, partner = rotation(cos_ptr, sin_ptr, t, half, columns)
    rotate_heads(q_ptr + b * q_batch + t * q_time, q_out_ptr, q_rstd_ptr, q_weight_ptr, cos, sin, partner, token,
                 q_head, q_heads, width, length, eps, offset, columns, HAS_NORM)
    rotate_heads(k_ptr + b * k_batch + t * k_time, k_out_ptr, k_rstd_ptr, k_weight_ptr, cos, sin, partner, token,
                 k_head, k_heads, width, length, eps, offset, columns, HAS_NORM)


@triton.jit
def differentiate_heads(grad_ptr, x_ptr, rstd_ptr, weight_ptr, grad_x_ptr, grad_weight, cos, sin,  # type: ignore
                        partner, token, grad_head, x_head, heads, width, length, offset, columns,
                        HAS_NORM: tl.constexpr):
    """∂x of all heads of a token; returns grad_weight with their ∂w added."""
    mask = columns < width
    if HAS_NORM:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + offset
    row = (token // length) * heads * length + token % length
    for _ in range(heads):
        grad = tl.load(grad_ptr + columns, mask=mask, other=0.0).to(tl.float32) * cos
        grad -= tl.load(grad_ptr + partner, mask=mask, other=0.0).to(tl.float32) * sin
        if HAS_NORM:
            rstd = tl.load(rstd_ptr + row)
            x_hat = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32) * rstd
            grad_weight += grad * x_hat
            grad *= weight
            grad = rstd * (grad - x_hat * (tl.sum(grad * x_hat, axis=0) / width))
        tl.store(grad_x_ptr + row * width + columns, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        grad_ptr += grad_head
        x_ptr += x_head
        row += length
    return grad_weight


@triton.jit
def rope_backward_kernel(grad_q_ptr, grad_k_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr,  # type: ignore
                         cos_ptr, sin_ptr, q_rstd_ptr, k_rstd_ptr, q_out_ptr, k_out_ptr, sums_ptr, gq_batch, gq_head,
                         gq_time, gk_batch, gk_head, gk_time, q_batch, q_head, q_time, k_batch, k_head, k_time,
                         q_heads, k_heads, length, width, half, offset, tokens, HAS_NORM: tl.constexpr,
                         BLOCK: tl.constexpr):
    """Every n-th token, of n programs: ∂q and ∂k of each, and with a norm the sums of both ∂w."""
    program, step = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    q_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    k_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    token = program.to(tl.int64)
    for _ in range(program, tokens, step):
        b, t = token // length, token % length
        cos, sin, partner = rotation(cos_ptr, sin_ptr, t, half, columns)
        q_sum = differentiate_heads(grad_q_ptr + b * gq_batch + t * gq_time, q_ptr + b * q_batch + t * q_time,
                                    q_rstd_ptr, q_weight_ptr, q_out_ptr, q_sum, cos, sin, partner, token, gq_head,
                                    q_head, q_heads, width, length, offset, columns, HAS_NORM)
        k_sum = differentiate_heads(grad_k_ptr + b * gk_batch + t * gk_time, k_ptr + b * k_batch + t * k_time,
                                    k_rstd_ptr, k_weight_ptr, k_out_ptr, k_sum, cos, sin, partner, token, gk_head,
                                    k_head, k_heads, width, length, offset, columns, HAS_NORM)
        token += step
    if HAS_NORM:
        start = sums_ptr + program.to(tl.int64) * 2 * width + columns
        tl.store(start, q_sum, mask=columns < width)
        tl.store(start + width, k_sum, mask=columns < width)


# ---------------------------------------------------------------- registered operators, with their launches

Pair = tuple[torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """x, with adjacent channels; a view where it has them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("blockgpt::rope", mutates_args=())
def rope_op(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: torch.Tensor | None,
            k_weight: torch.Tensor | None, eps: float, offset: float) -> Four:
    check_inputs(q, k, cos)
    q, k = adjacent(q), adjacent(k)
    (B, H, T, D), G = q.shape, k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    normed = q_weight is not None
    q_rstd, k_rstd = (torch.empty(x.shape[:3] if normed else (0,), dtype=torch.float32, device=x.device)
                      for x in (q, k))
    if B * T:
        block = block_size(D)
        rope_forward_kernel[(B * T,)](
            q, k, q if q_weight is None else q_weight.contiguous(), k if k_weight is None else k_weight.contiguous(),
            cos.contiguous(), sin.contiguous(), q_out, k_out, q_rstd, k_rstd, *q.stride()[:3], *k.stride()[:3], H, G, T,
            D, cos.shape[-1], eps, offset, HAS_NORM=normed, BLOCK=block, num_warps=warps(block))
    return q_out, k_out, q_rstd, k_rstd


@rope_op.register_fake
def fake_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: torch.Tensor | None,
              k_weight: torch.Tensor | None, eps: float, offset: float) -> Four:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_rstd, k_rstd = (x.new_empty((0,) if q_weight is None else x.shape[:3], dtype=torch.float32) for x in (q, k))
    return q_out, k_out, q_rstd, k_rstd


@torch.library.custom_op("blockgpt::rope_backward", mutates_args=())
def rope_backward_op(grad_q: torch.Tensor, grad_k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                     saved: list[torch.Tensor], offset: float) -> Four:
    """(∂q, ∂k, and of the weights of their norms). saved: q, k, the weights, r of q and k; empty without a norm."""
    grad_q, grad_k = adjacent(grad_q), adjacent(grad_k)
    q, k, q_weight, k_weight, q_rstd, k_rstd = saved or [grad_q, grad_k, *[grad_q] * 4]
    q, k = adjacent(q), adjacent(k)
    (B, H, T, D), G = grad_q.shape, grad_k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    count = min(programs(q.device), B * T)
    sums = torch.empty(count, 2, D if saved else 0, dtype=torch.float32, device=q.device)
    if count:
        block = block_size(D)
        rope_backward_kernel[(count,)](
            grad_q, grad_k, q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(),
            q_rstd, k_rstd, q_out, k_out, sums, *grad_q.stride()[:3], *grad_k.stride()[:3], *q.stride()[:3],
            *k.stride()[:3], H, G, T, D, cos.shape[-1], offset, B * T, HAS_NORM=bool(saved), BLOCK=block,
            num_warps=warps(block))
    q_sum, k_sum = sums.sum(dim=0)
    return q_out, k_out, q_sum.to(q_weight.dtype, copy=True), k_sum.to(k_weight.dtype, copy=True)


@rope_backward_op.register_fake
def fake_rope_backward(grad_q: torch.Tensor, grad_k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                       saved: list[torch.Tensor], offset: float) -> Four:
    q, k, q_weight, k_weight = saved[:4] if saved else [grad_q, grad_k, grad_q, grad_k]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_sum, k_sum = (q.new_empty(q.shape[-1] if saved else 0, dtype=w.dtype) for w in (q_weight, k_weight))
    return q_out, k_out, q_sum, k_sum


def save_for_rope(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    q, k, cos, sin, q_weight, k_weight, _, ctx.offset = inputs
    ctx.save_for_backward(cos, sin, *(() if q_weight is None else (q, k, q_weight, k_weight, *output[2:])))
    ctx.mark_non_differentiable(*output[2:])


def differentiate_rope(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor,
                       *_: Any) -> tuple[torch.Tensor | None, ...]:
    cos, sin, *saved = ctx.saved_tensors
    q, k, q_weight, k_weight = rope_backward_op(grad_q, grad_k, cos, sin, saved, ctx.offset)
    return q, k, None, None, *((q_weight, k_weight) if saved else (None, None)), None, None


rope_op.register_autograd(differentiate_rope, setup_context=save_for_rope)
for operator in ("rope", "rope_backward"):  # FLOPs are those of matrix products
    register_flop_formula(getattr(torch.ops.blockgpt, operator))(lambda *args, **kwargs: 0)


# ---------------------------------------------------------------- functions


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
         weights: Pair | None = None, eps: float = 0.0, offset: float = 0.0) -> Pair:
    """q (B, H, T, D) and k (B, G, T, D) rotated by cos and sin (T, R/2); first normalised, with `weights` (D,) each."""
    q_out, k_out, *_ = rope_op(q, k, cos, sin, *(weights or (None, None)), eps, offset)
    return q_out, k_out


def rotary_torch(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
               weights: Pair | None = None, eps: float = 0.0, offset: float = 0.0) -> Pair:
    """`rotary` in plain PyTorch."""
    def rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            x = F.rms_norm(x, x.shape[-1:], (weight + offset).to(x.dtype), eps)
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        a, b, rest = x.tensor_split((c.shape[-1], 2 * c.shape[-1]), dim=-1)
        return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1)

    q_weight, k_weight = weights or (None, None)
    return rotate(q, q_weight), rotate(k, k_weight)
