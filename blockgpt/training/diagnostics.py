"""What a step tells about itself: loss spikes, gradient statistics."""

import math

from torch.nn.utils import get_total_norm

from blockgpt.training.optimizers import full_tensor


class LossSpikeDetector:
    """Losses that leave the running mean by more than `threshold` standard deviations, upwards.

    Mean and variance are exponential averages over some 100 steps, to which a spike counts no more than the threshold:
    a loss that stays high is soon no spike any more. The first 100 steps have none. state: as checkpoints keep it.
    """

    HORIZON = 100

    def __init__(self, threshold, state=None):
        self.threshold = threshold
        self.state = state or {"count": 0, "mean": 0.0, "variance": 0.0}

    def __call__(self, loss):
        """How many standard deviations `loss` lies above the mean, if that is a spike; None if not. Notes the loss."""
        if not math.isfinite(loss):  # float16 with a scale too large: the scaler's affair
            return None
        count, mean, variance = self.state["count"], self.state["mean"], self.state["variance"]
        deviation = max(math.sqrt(variance), 1e-3 * abs(mean))
        excess = (loss - mean) / deviation if count >= self.HORIZON and deviation else 0.0
        spike = excess > self.threshold
        if spike:
            loss = mean + self.threshold * deviation
        weight = 1 / min(count + 1, self.HORIZON)
        self.state = {"count": count + 1, "mean": mean + weight * (loss - mean),
                      "variance": (1 - weight) * (variance + weight * (loss - mean) ** 2)}
        return excess if spike else None


def gradient_statistics(model):
    """{layer: {grad_norm, grad_max, weight_norm}} of the gradients at hand; layers are blocks and the parts around."""
    layers = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            parts = name.split(".")
            layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(p)
    def norm(tensors):  # each by itself: those of a layer may lie on different grids of processes
        return get_total_norm([full_tensor(get_total_norm([t])) for t in tensors]).item()

    return {layer: {"grad_norm": norm([p.grad for p in ps]),
                    "grad_max": max(full_tensor(p.grad).abs().max().item() for p in ps),
                    "weight_norm": norm([p.detach() for p in ps])} for layer, ps in layers.items()}
