"""The output head and its loss by chunks of tokens, so that the logits of a micro-batch never exist at once.

    z = h Wᵀ, capped: s = c tanh(z / c)        loss_i = log Σ_v exp(s_iv) - s_i,y_i, 0 where y_i = -1
    ∂loss_i/∂s_iv = softmax(s_i)_v - [v = y_i]     ∂/∂z = ∂/∂s (1 - tanh²(z / c))
    ∂/∂h = ∂/∂z W                                  ∂/∂W = ∂/∂zᵀ h

N tokens, C channels, V vocabulary. Plain PyTorch holds several tensors of N x V. This holds the logits of one chunk.

`linear_cross_entropy` computes the gradients of the sum of the losses in the forward pass, while it has the logits of a
chunk, and saves them: N x C and V x C. The backward pass multiplies them by the gradient of the loss. So there are
three matrix products of the head, as without chunks, and none is computed twice. (Liger Kernel, Hsu et al. 2024, does
the same.) It is a plain `autograd.Function`: the compiler, the FLOP counter and the memory account see its operators.

`recomputed_cross_entropy` takes any function that computes logits, and computes them again in the backward pass. It is
for what the other cannot do: one loss per token with gradients, and a head that is sharded over processes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -1  # the target of a token without one

chunk_limit: int | None = None


@contextlib.contextmanager
def first_chunks_only(limit: int) -> Iterator[None]:
    """A context in which no more chunks are computed: for the memory account, as the later ones need no more memory."""
    global chunk_limit
    before, chunk_limit = chunk_limit, limit
    try:
        yield
    finally:
        chunk_limit = before


def chunk_slices(tokens: int, chunk: int) -> list[slice]:
    """The chunks of `tokens` tokens; the last may be shorter."""
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)][:chunk_limit]


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses of all tokens, with gradients of h and W."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
                cap: float | None, dtype: torch.dtype) -> torch.Tensor:
        """The arguments of `linear_cross_entropy`; dtype: of the matrix products."""
        h_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        w = weight.to(dtype)  # (V, C)
        accumulated = torch.promote_types(weight.dtype, torch.float32)
        losses = torch.empty(len(h), dtype=torch.promote_types(dtype, torch.float32), device=h.device)  # (N,)
        grad_h = torch.empty_like(h) if h_needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=accumulated) if weight_needs_grad else None
        for tokens in chunk_slices(len(h), chunk):
            x, y = h[tokens].to(dtype), targets[tokens, None]  # (n, C), (n, 1)
            z = x @ w.T  # (n, V)
            tanh = None if cap is None else torch.tanh(z / cap)
            s = z if tanh is None or cap is None else tanh * cap
            log_p = torch.log_softmax(s.to(losses.dtype), dim=-1)
            del z, s
            has_target, column = y != IGNORED, y.clamp(min=0)
            losses[tokens] = torch.where(has_target, -log_p.gather(1, column), 0.0)[:, 0]
            grad = log_p.exp_()  # softmax
            grad.scatter_add_(1, column, torch.full_like(column, -1, dtype=grad.dtype))
            grad = grad.mul_(has_target).to(dtype)
            del log_p
            if tanh is not None:
                grad = grad * (1 - tanh.square())
            if grad_h is not None:
                grad_h[tokens] = (grad @ w).to(h.dtype)
            if grad_weight is not None and dtype == accumulated:
                grad_weight.addmm_(grad.T, x)
            elif grad_weight is not None:
                grad_weight += grad.T @ x
            del grad, tanh
        ctx.save_for_backward(grad_h, grad_weight)
        ctx.weight_dtype = weight.dtype
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_h, grad_weight = ctx.saved_tensors
        return (None if grad_h is None else (grad_h * grad).to(grad_h.dtype),
                None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype), None, None, None, None)


def linear_cross_entropy(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
                         cap: float | None = None, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of the logits h Wᵀ, which never exist for more than `chunk` tokens.

    Under autocast the products have its dtype. Losses, the softmax and the sums over chunks are in float32, or float64
    if the inputs are.

    Args:
        h: (N, C).
        weight: (V, C).
        targets: (N,) int64; -1 is ignored.
        chunk: tokens per chunk, at least 1.
        cap: of the logits, cap * tanh(logits / cap); None: no cap.
        reduction: "mean" over the targets that are not ignored, NaN if there are none; or "sum".
    """
    device = h.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(h.dtype, weight.dtype)
    loss: torch.Tensor = LinearCrossEntropy.apply(h, weight, targets, chunk, cap, dtype)
    if reduction == "sum":
        return loss
    assert reduction == "mean", reduction
    count = (targets != IGNORED).sum()
    # NaN without targets, and the gradients 0, as torch's.
    return loss / count.clamp(min=1) + torch.where(count > 0, 0.0, float("nan"))


def recomputed_cross_entropy(logits_of: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor, targets: torch.Tensor,
                             chunk: int) -> torch.Tensor:
    """Cross-entropy in nats of each token, (N,), 0 where ignored; the backward pass computes each chunk again.

    Args:
        logits_of: from (n, C) to (n, V).
        h: (N, C).
        targets: (N,) int64; -1 is ignored.
        chunk: tokens per chunk, at least 1.
    """
    def losses(h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(h).float(), targets, ignore_index=IGNORED, reduction="none")

    chunks = [(h[tokens], targets[tokens]) for tokens in chunk_slices(len(h), chunk)]
    if not torch.is_grad_enabled():
        return torch.cat([losses(*arguments) for arguments in chunks])
    # Nothing in the head draws random numbers.
    return torch.cat([checkpoint(losses, *arguments, use_reentrant=False, preserve_rng_state=False)
                      for arguments in chunks])
