"""Optimizers, parameter groups and learning-rate schedules."""

import math

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

FUSED_DEVICES = ("cuda", "cpu", "mps")  # where torch.optim.AdamW has a fused step


def build_optimizer(model, config, device):
    """AdamW (Loshchilov & Hutter 2019): matrices decay, norms and biases do not.

    One group for each learning-rate multiplier that the model's initialisation asks for (muP). A smaller rate does
    not mean less decay: their product is the same in all groups that decay. use_zero1: each process holds the moments
    of some of the parameters and updates these for all (ZeRO stage 1, Rajbhandari et al. 2020).
    """
    multipliers = model.lr_multipliers()
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((p.dim() < 2, multipliers[name], mesh_names(p)), []).append(p)
    groups = [{"params": parameters, "weight_decay": 0.0 if vectors else config.weight_decay / multiplier,
               "lr_multiplier": multiplier} for (vectors, multiplier, _), parameters in sorted(groups.items())]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2),
                "fused": device.type in FUSED_DEVICES}
    if config.use_zero1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def mesh_names(tensor):
    """The dimensions of a DTensor's grid of processes, () of any other: those alike can be computed together."""
    return tensor.device_mesh.mesh_dim_names if hasattr(tensor, "device_mesh") else ()


def learning_rate(step, config):
    """The rate of step `step` (from 0): linear warm-up, then cosine to min_lr at lr_decay_iters, or constant."""
    peak = config.learning_rate
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    warmup = min(100, min(end, config.max_iters) // 10) if config.warmup_iters is None else config.warmup_iters
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return peak
    floor = peak / 10 if config.min_lr is None else config.min_lr
    if step >= end:
        return floor
    progress = (step - warmup) / (end - warmup)  # 0 at the peak, 1 at the floor
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


def clip_gradients(model, largest):
    """Scale all gradients so that their norm is at most `largest` (0: leave them); the norm before, a float.

    The norm is the whole model's, however it is parted.
    """
    groups = {}
    for p in model.parameters():
        if p.grad is not None:
            groups.setdefault(mesh_names(p), []).append(p)
    norms = [full_tensor(get_total_norm([p.grad for p in ps])) for ps in groups.values()]
    total = norms[0] if len(norms) == 1 else get_total_norm(norms)
    if largest:
        for parameters in groups.values():
            clip_grads_with_norm_(parameters, largest, total)
    return total.item()


def full_tensor(tensor):
    """A DTensor put together, on every process; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


