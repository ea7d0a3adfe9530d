"""Activation checkpointing: what a block's forward pass saves less, and its backward pass computes again.

A kind is a line in `CHECKPOINTING_MODES`. It stands here, below the account of memory, so that the account runs what training runs.
"""

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten

# By name, as not every build of torch has every kernel; what `linear` and `matmul` come down to is among them.
PRODUCTS = frozenset(getattr(aten, name).default for name in (
    "mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable") if hasattr(aten, name)
) | {torch.ops.higher_order.flex_attention}


def keep_products(context, operator, *args, **kwargs):
    """The policy of 'selective': results of matrix products and attention kernels are kept, all else is run again."""
    if operator not in PRODUCTS or drops_out(operator, args, kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def drops_out(operator, args, kwargs):
    """Whether a kernel draws random numbers: left out, it would leave those that it drew to the dropout after it."""
    names = [a.name for a in operator._schema.arguments] if hasattr(operator, "_schema") else []
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p"))


CHECKPOINTING_MODES = {  # activation_checkpointing: what its checkpoints are given beside the defaults; None: no checkpoint
    "none": None,
    "full": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)},
}


def recompute(model, kind):
    """`model`, changed: each of its blocks runs again in the backward pass, in the way of `kind`.

    kind: 'none' takes away what another call did; 'full' keeps a block's inputs alone and runs all of it again, one
    more forward pass of the blocks; 'selective' also keeps what matrix products and fused attention gave, and runs
    what is cheap between them again: no matrix product twice, but for attention kernels with dropout, whose random
    numbers must be drawn again. FLOPs of a second run are no model FLOPs: MFU does not count them.

    Loss and gradients are equal to the last bit, dropout's random numbers being the same again. Without gradients
    (evaluation, generation) the forward pass is the plain one. What is replaced is `block.forward`: module and
    parameter names, and hooks such as FSDP's, stay as they are. To be called before torch.compile.
    Chen et al. 2016; selective: Korthikanti et al. 2022.
    """
    options = CHECKPOINTING_MODES[kind]
    for block in model.blocks:
        vars(block).pop("forward", None)
        if options is not None:
            block.forward = partial(checkpointed, block.forward, options)
    return model


def checkpointed(forward, options, *args, **kwargs):
    """forward(*args, **kwargs), to be run again in the backward pass, if there will be one."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)
