"""Optimizers, parameter groups and learning-rate schedules."""

import math

import torch

from model_builder import lr_multipliers

FUSED_DEVICES = ("cuda", "cpu", "mps")  # where torch.optim.AdamW has a fused step


def build_optimizer(model, config, device):
    """AdamW (Loshchilov & Hutter 2019): matrices decay, norms and biases do not.

    One group for each learning-rate multiplier that the model's initialisation asks for (muP). A smaller rate does
    not mean less decay: their product is the same in all groups that decay.
    """
    multipliers = lr_multipliers(model)
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((p.dim() < 2, multipliers[name]), []).append(p)
    groups = [{"params": parameters, "weight_decay": 0.0 if vectors else config.weight_decay / multiplier,
               "lr_multiplier": multiplier} for (vectors, multiplier), parameters in sorted(groups.items())]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             fused=device.type in FUSED_DEVICES)


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


def gradient_statistics(model):
    """{layer: {grad_norm, grad_max, weight_norm}} of the gradients at hand; layers are blocks and the parts around."""
    layers = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            parts = name.split(".")
            layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(p)
    norm = torch.nn.utils.get_total_norm
    return {layer: {"grad_norm": norm([p.grad for p in ps]).item(),
                    "grad_max": max(p.grad.abs().max().item() for p in ps),
                    "weight_norm": norm([p.detach() for p in ps]).item()} for layer, ps in layers.items()}
