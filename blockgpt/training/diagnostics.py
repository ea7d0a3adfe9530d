"""Health checks of a training step: finite values, loss spikes, gradient statistics."""

import math
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from blockgpt.errors import NonFiniteError
from blockgpt.training.faults import StepStatus
from blockgpt.training.launch import Runtime
from blockgpt.training.objectives import Objective
from blockgpt.training.optimizers import full_tensor


def is_usable(status: StepStatus, scaler: torch.amp.GradScaler) -> bool:
    """Whether a step's loss and gradients are finite, or a float16 loss scale above 1 may be the cause.

    The scaler skips the update of such a step and lowers the scale.
    """
    return status.is_finite or (scaler.is_enabled() and scaler.get_scale() > 1)


def non_finite_error(status: StepStatus, step: int, lr: float, objective: Objective, runtime: Runtime,
                     last_saved: int | None) -> NonFiniteError:
    """The error that ends a run before the update of step `step` (from 1), with the data that it was computed on."""
    grad_norm = next((norm for norm in status.grad_norms if not math.isfinite(norm)), status.grad_norms[0])
    places = [f"on rank {rank}: {objective.locate(step - 1, micro_step, rank // runtime.tp_size)}"
              for rank, micro_step in enumerate(status.nonfinite_micro_steps) if micro_step >= 0]
    where = " " + "; ".join(places[:4]) if places else ""
    return NonFiniteError(
        f"step {step}: loss {status.loss:g}, gradient norm {grad_norm:g} at learning rate {lr:.3g}{where}: stopped "
        "before the update (try a lower learning_rate, a longer warmup_iters, grad_clip=1, or dtype=float32; the last "
        f"good checkpoint: {'none' if last_saved is None else f'step {last_saved}'})")


class LossSpikeDetector:
    """Finds losses that are more than `threshold` standard deviations above their running mean.

    Mean and variance are exponential averages over about 100 steps. A spike counts in them as `threshold` standard
    deviations at most, so a loss that stays high soon stops being a spike. The first 100 steps have no spikes.
    """

    HORIZON = 100

    def __init__(self, threshold: float, state: dict[str, float] | None = None) -> None:
        """state: the `state` of a detector, as checkpoints keep it; None: a new one."""
        self.threshold = threshold
        self.state = state or {"count": 0, "mean": 0.0, "variance": 0.0}

    def z_score(self, loss: float) -> float | None:
        """Add `loss` to the averages; its standard deviations above the mean if that is a spike, else None."""
        if not math.isfinite(loss):  # float16 with too large a loss scale: the scaler deals with it
            return None
        count, mean, variance = self.state["count"], self.state["mean"], self.state["variance"]
        deviation = max(math.sqrt(variance), 1e-3 * abs(mean))
        score = (loss - mean) / deviation if count >= self.HORIZON and deviation else 0.0
        is_spike = score > self.threshold
        if is_spike:
            loss = mean + self.threshold * deviation
        weight = 1 / min(count + 1, self.HORIZON)
        self.state = {"count": count + 1, "mean": mean + weight * (loss - mean),
                      "variance": (1 - weight) * (variance + weight * (loss - mean) ** 2)}
        return score if is_spike else None


def gradient_statistics(model: Any) -> dict[str, dict[str, float]]:
    """{layer: {grad_norm, grad_max, weight_norm}} of the current gradients; the loop calls it before it clips them.

    A layer is a block, or a module outside the blocks.
    """
    layers: dict[str, list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            path = name.split(".")
            layers.setdefault(".".join(path[: 2 if path[0] == "blocks" else 1]), []).append(p)

    def norm(tensors: list[torch.Tensor]) -> float:  # one by one: the tensors of a layer may be on different meshes
        return get_total_norm([full_tensor(get_total_norm([t])) for t in tensors]).item()

    return {layer: {"grad_norm": norm([p.grad for p in ps if p.grad is not None]),
                    "grad_max": max(full_tensor(p.grad).abs().max().item() for p in ps if p.grad is not None),
                    "weight_norm": norm([p.detach() for p in ps])} for layer, ps in layers.items()}
