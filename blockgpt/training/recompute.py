"""Activation checkpointing: what a block's forward pass saves, and what its backward pass computes again.

A new mode is a line in `CHECKPOINTING_MODES`. The memory account (accounting/memory.py) imports this module, so that it
measures what training runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten

# Looked up by name, as not every build of torch has every kernel. `linear` and `matmul` dispatch to these.
MATMUL_OPS = frozenset(getattr(aten, name).default for name in (
    "mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable") if hasattr(aten, name)
) | {torch.ops.higher_order.flex_attention}


Model = TypeVar("Model", bound=nn.Module)


def save_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of 'selective': save the results of matrix products and attention kernels, recompute the rest."""
    if op not in MATMUL_OPS or uses_dropout(op, args, kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def uses_dropout(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a kernel draws random numbers.

    Such a kernel must run again: without it, the dropout that follows would draw the kernel's random numbers.
    """
    names = [a.name for a in op._schema.arguments] if hasattr(op, "_schema") else []
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p"))


# activation_checkpointing: the arguments of torch.utils.checkpoint; None for no checkpointing
CHECKPOINTING_MODES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "full": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, save_matmuls)},
}


def recompute(model: Model, mode: str) -> Model:
    """Apply activation checkpointing to each block of `model`, in place.

    The loss and the gradients are bitwise equal in all modes; dropout draws the same random numbers again. Without
    gradients (evaluation, generation) the plain forward pass runs. Only `block.forward` is replaced: names of modules
    and parameters stay, and so do hooks such as FSDP's. Call it before torch.compile. FLOPs of recomputation are not
    model FLOPs: MFU does not count them.

    Args:
        model: its blocks are in `model.blocks`.
        mode: 'none' removes the effect of an earlier call. 'full' saves only a block's inputs and recomputes the block,
            one more forward pass of all blocks (Chen et al. 2016). 'selective' also saves the results of matrix
            products and fused attention, so that it recomputes cheap operations only, except for attention kernels
            with dropout (Korthikanti et al. 2022).

    Returns:
        `model`.
    """
    options = CHECKPOINTING_MODES[mode]
    blocks: Any = model.blocks
    for block in blocks:
        vars(block).pop("forward", None)
        if options is not None:
            block.forward = partial(checkpointed_forward, block.forward, options)
    return model


def checkpointed_forward(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """forward(*args, **kwargs), checkpointed if a backward pass can follow."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)
