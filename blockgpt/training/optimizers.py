"""The optimizer, its parameter groups, gradient clipping and learning-rate schedules."""

import inspect
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

FUSED_DEVICES = ("cuda", "cpu", "mps")  # where torch.optim.AdamW has a fused step


class AdamW(torch.optim.AdamW):
    """torch's AdamW. Some methods there import torch._dynamo, to keep it out of them; here no compiler sees them."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(model: Any, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019): matrices decay, norms and biases do not.

    There is one group for each learning-rate multiplier that the model's initialisation sets (muP). A smaller lr
    does not mean less decay: lr × weight decay is the same in all groups that decay. With use_zero1, each process holds
    the optimizer state of some parameters and updates these for all (ZeRO stage 1, Rajbhandari et al. 2020).
    """
    multipliers = model.lr_multipliers()
    by_key: dict[tuple[bool, float, tuple[str, ...]], list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            by_key.setdefault((p.dim() < 2, multipliers[name], mesh_dim_names(p)), []).append(p)
    groups = [{"params": parameters, "weight_decay": 0.0 if is_vector else config.weight_decay / multiplier,
               "lr_multiplier": multiplier} for (is_vector, multiplier, _), parameters in sorted(by_key.items())]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2),
                "fused": device.type in FUSED_DEVICES}
    if config.use_zero1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, AdamW, **settings)
    return AdamW(groups, **settings)


def mesh_dim_names(tensor: torch.Tensor) -> tuple[str, ...]:
    """The mesh dimensions of a DTensor, () of a plain tensor. Only tensors of equal ones can be computed together."""
    return tensor.device_mesh.mesh_dim_names if hasattr(tensor, "device_mesh") else ()


def learning_rate(step: int, config: Any) -> float:
    """The lr of step `step` (from 0): linear warm-up, then cosine to min_lr at lr_decay_iters, or constant."""
    peak = config.learning_rate
    constant = config.lr_schedule == "constant"
    end = config.max_iters if constant or config.lr_decay_iters is None else config.lr_decay_iters
    warmup = min(100, min(end, config.max_iters) // 10) if config.warmup_iters is None else config.warmup_iters
    if step < warmup:
        return peak * (step + 1) / warmup
    if constant:
        return peak
    floor = peak / 10 if config.min_lr is None else config.min_lr
    if step >= end:
        return floor
    progress = (step - warmup) / (end - warmup)  # 0 at the peak, 1 at the floor
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)


def rate_change(step: int, config: Any, changed: Mapping[str, Sequence[Any]]) -> str | None:
    """How the keys that a resume changes, {key: [before, now]}, change the rate of step `step` (from 0); None: not."""
    former = SimpleNamespace(**{**config.flat(), **{key: before for key, (before, _) in changed.items()}})
    before, now = learning_rate(step, former), learning_rate(step, config)
    if before == now:
        return None
    follows = "max_iters" in changed and config.lr_decay_iters is None and config.lr_schedule == "cosine"
    keep = f" (it follows max_iters; --lr_decay_iters={former.max_iters} keeps the former decay)" if follows else ""
    return f"the learning rate of step {step + 1} is {now:.3g}, it was to be {before:.3g}{keep}"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group lr × its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def clip_gradients(model: torch.nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their norm is at most `max_norm` (0: no clipping); returns the norm before.

    The norm is that of the whole model, however it is sharded.
    """
    by_mesh: dict[tuple[str, ...], list[torch.nn.Parameter]] = {}
    for p in model.parameters():
        if p.grad is not None:
            by_mesh.setdefault(mesh_dim_names(p), []).append(p)
    norms = [full_tensor(get_total_norm([p.grad for p in ps if p.grad is not None])) for ps in by_mesh.values()]
    total = norms[0] if len(norms) == 1 else get_total_norm(norms)
    if max_norm:
        for parameters in by_mesh.values():
            clip_grads_with_norm_(parameters, max_norm, total)
    return total.item()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, on every process; a plain tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
