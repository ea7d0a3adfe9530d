"""The components of a transformer, one class for each option of the axis tables in `model_config.py`.

This module has norms, norm positions, activations, FFNs, the mixing of embeddings into the residual stream, and the
output head. Position encodings, attention and initialisation are in `model_positions.py`, `model_attention.py` and
`model_init.py`. Each axis has one call signature:

    norm          Norm(config, dim)(x)                    -> x
    norm_position Residual(config)(x, sublayer, pending)  -> (x, pending)  (owns its norms; `final_norm`: one more norm
                                                                            before the head?)
    activation    Activation()(x)                         -> x
    ffn           FFN(config)(x)                          -> x
    position      Position(config): .embed(x, positions), .cos_sin(positions, window), .alibi_slopes(device)
    attention     Attention(config, layer)(x, context)    -> x      (context: `model_attention.ForwardContext`)

Shapes: B batch, T time, S keys, C channels = n_embd, H query heads, G key/value heads, D head_dim, F d_ff,
V vocab_size.

A component says of itself, in methods that are all optional:

    config_values()   {key: value} of the configuration keys it was built from, read from what it computes with
    flops(seq_len)    {label: forward FLOPs per token}; a multiply-add counts as two, inactive experts not at all
    inactive_parameters()   how many of its parameters one token does not use, such as those of other experts
    aux_loss()        a scalar to be added to the loss of the last forward pass
    metrics()         {name: scalar tensor} of the last forward pass
    place_weights(device)   moves its parameters in memory, after they have got a new device or dtype
    kernel, kernel_family   the module of blockgpt/kernels that computes it, or None; and its name (see choose.py there)

For `config_values` and `flops` a component speaks for the components inside it. The shapes of its tensors must not
depend on data; otherwise the memory account and torch.compile cannot trace it.

`model_init.py` initialises the parameters, except those with a constant in the component's `init_constants`. Linear
layers that write to the residual stream are `ResidualProjection`s. `tp_plan` says how tensor parallelism shards a
component (see blockgpt/training/sharding.py); without a plan, every rank does the same work.
To add a component: write its class here, add a line to the axis table, test it in tests/model/test_components.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn as nn

from blockgpt.checkpoints.files import is_dtensor
from blockgpt.kernels.choose import load_kernels
from blockgpt.kernels.linear_cross_entropy import linear_cross_entropy, recomputed_cross_entropy
from model_config import AXES, ModelConfig


def component(axis: str, config: ModelConfig) -> type[Any]:
    """The class of the option that `config` chooses on `axis`. `config` must be resolved."""
    return AXES[axis][getattr(config, axis)].load_class()


def build_norm(config: ModelConfig, dim: int | None = None) -> nn.Module:
    """A norm as `config.normalization` says, over a last dimension of `dim` (n_embd by default)."""
    return component("normalization", config)(config, dim or config.n_embd)


class ResidualProjection(nn.Linear):
    """A linear layer that writes to the residual stream."""


# ---------------------------------------------------------------- linear layers that read the same input


class JoinWeights(torch.autograd.Function):
    """The weights of several linear layers, adjacent in memory, as one matrix, without a copy."""

    @staticmethod
    def forward(ctx: Any, *weights: torch.Tensor) -> torch.Tensor:
        """Each (F, C) -> (sum of F, C)."""
        ctx.sizes, columns = [len(weight) for weight in weights], weights[0].shape[1]
        return weights[0].detach().as_strided((sum(ctx.sizes), columns), (columns, 1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad.split(ctx.sizes)


class PlacesWeights(nn.Module):
    """A module that places its parameters in memory whenever they are allocated or converted."""

    def place_weights(self, device: torch.device) -> None:
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PlacesWeights":
        super()._apply(fn, recurse)  # what `to`, `to_empty`, `double`, … call
        self.place_weights(next(self.parameters()).device)
        return self


def place_adjacent(*layers: nn.Linear) -> None:
    """Move the weights of `layers` into one allocation, one after the other, so that `joint_linear` joins them.

    Sharded weights stay where they are.
    """
    if any(is_dtensor(layer.weight) for layer in layers):
        return
    joint = torch.cat([layer.weight.detach() for layer in layers])
    for layer, weight in zip(layers, joint.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = weight


def joint_linear(x: torch.Tensor, *layers: nn.Linear) -> Sequence[torch.Tensor]:
    """[layer(x) for layer in layers]: one product where `place_adjacent` has put the weights and they still are.

    Elsewhere one product each: where the weights are sharded, were moved, or belong to other modules than `nn.Linear`.
    A compiler that writes GPU kernels joins them by a copy. Under autocast x is cast, and saved, once.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weights = [layer.weight for layer in layers]
    if all(type(layer) is nn.Linear for layer in layers):
        compiled = torch.compiler.is_compiling()
        if (x.is_cuda and not any(is_dtensor(w) for w in weights)) if compiled else are_adjacent(weights):
            bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
            joint = torch.cat(weights) if compiled else JoinWeights.apply(*weights)
            return nn.functional.linear(x, joint, bias).split([len(weight) for weight in weights], -1)
    return [layer(x) for layer in layers]


def are_adjacent(weights: Sequence[torch.Tensor]) -> bool:
    """Whether each weight, an ordinary contiguous matrix, begins in memory where the one before it ends."""
    first = weights[0]
    if any(is_dtensor(weight) or not weight.is_contiguous() for weight in weights):
        return False
    storage, end = first.untyped_storage()._cdata, first.storage_offset()
    for weight in weights:
        if weight.untyped_storage()._cdata != storage or weight.storage_offset() != end:
            return False
        end += weight.numel()
    return True


# ---------------------------------------------------------------- norms


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension. Ba et al. 2016."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__(dim, eps=config.norm_eps)

    def config_values(self) -> dict[str, Any]:
        return {"norm_eps": self.eps}


class LayerNormNoBias(nn.LayerNorm):
    """LayerNorm without the bias."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__(dim, eps=config.norm_eps, bias=False)

    def config_values(self) -> dict[str, Any]:
        return {"norm_eps": self.eps}


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension. Zhang & Sennrich 2019."""

    kernel_family = "rms_norm"
    offset = 0.0  # added to the weight

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__(dim, eps=config.norm_eps)
        self.kernel: Any = load_kernels(self.kernel_family) if config.kernels == "triton" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel is not None:
            return self.kernel.rms_norm(x, self.weight, self.eps, self.offset)
        return nn.functional.rms_norm(x, self.normalized_shape, self.scale(), self.eps)

    def scale(self) -> torch.Tensor:
        return self.weight

    def config_values(self) -> dict[str, Any]:
        return {"norm_eps": self.eps}


class GemmaRMSNorm(RMSNorm):
    """x / sqrt(mean(x²) + eps) * (1 + weight) over the last dimension; weight is initialised to 0. Gemma Team 2024."""

    init_constants: ClassVar[dict[str, float]] = {"weight": 0.0}
    offset = 1.0

    def scale(self) -> torch.Tensor:
        return 1.0 + self.weight


class DynamicTanh(nn.Module):
    """tanh(alpha x) * weight + bias: bounds activations as a norm does, without statistics. Zhu et al. 2025."""

    init_constants: ClassVar[dict[str, float]] = {"alpha": 0.5}

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


# ---------------------------------------------------------------- norm positions

Sublayer = Callable[[torch.Tensor], torch.Tensor]


class PreNorm(nn.Module):
    """x + sublayer(norm(x)). The stream itself is never normalised, so the head needs a norm before it.

    It is also the base of the other norm positions: `branch` computes what a sublayer adds to the stream, `join` adds
    it. residual_scale multiplies what is added, as in Granite.
    """

    final_norm = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm: Any = build_norm(config)
        self.scale = config.residual_scale

    def branch(self, x: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
        """What `sublayer` adds to the stream x, before residual_scale."""
        return sublayer(self.norm(x))

    def join(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + self.scaled(y)

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.scale == 1.0 else y * self.scale

    def add_norm(self, x: torch.Tensor, pending: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + pending, its norm): one operation, which a kernel fuses."""
        if pending is not None and getattr(self.norm, "kernel", None) is not None:
            return self.norm.kernel.add_rms_norm(x, pending, self.norm.weight, self.norm.eps, self.norm.offset)
        x = x if pending is None else x + pending
        return x, self.norm(x)

    def forward(self, x: torch.Tensor, sublayer: Sublayer, pending: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stream is x + pending: a sum may be left to the next norm. Returns the new stream as such a pair."""
        x, h = self.add_norm(x, pending)
        return x, self.scaled(sublayer(h))

    def config_values(self) -> dict[str, Any]:
        return {"residual_scale": self.scale}


class PostNorm(PreNorm):
    """norm(x + sublayer(x)). Vaswani et al. 2017."""

    final_norm = False

    def branch(self, x: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
        return sublayer(x)

    def join(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(super().join(x, y))

    def forward(self, x: torch.Tensor, sublayer: Sublayer, pending: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x if pending is None else x + pending
        return self.join(x, self.branch(x, sublayer)), None


class SandwichNorm(PreNorm):
    """x + norm_after(sublayer(norm(x))). Ding et al. 2021; Gemma 2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm_after = build_norm(config)

    def branch(self, x: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
        return self.norm_after(sublayer(self.norm(x)))

    def forward(self, x: torch.Tensor, sublayer: Sublayer, pending: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, h = self.add_norm(x, pending)
        return x, self.scaled(self.norm_after(sublayer(h)))


class ReorderedNorm(PreNorm):
    """x + norm(sublayer(x)). OLMo 2 (2025), after Swin v2."""

    def branch(self, x: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
        return self.norm(sublayer(x))

    def forward(self, x: torch.Tensor, sublayer: Sublayer, pending: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x if pending is None else x + pending
        return x, self.scaled(self.branch(x, sublayer))


class X0Mix(nn.Module):
    """stream * x + first * x0: mixes the embeddings x0 back in before a block; first starts at 0. modded-nanogpt."""

    init_constants: ClassVar[dict[str, float]] = {"stream": 1.0, "first": 0.0}

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Parameter(torch.empty(1))
        self.first = nn.Parameter(torch.empty(1))

    def forward(self, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        return self.stream * x + self.first * x0


# ---------------------------------------------------------------- activations and FFNs


class GELUTanh(nn.GELU):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class ReLU2(nn.Module):
    """max(x, 0)². So et al. 2021 (Primer)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(x).square()


class StandardFFN(nn.Module):
    """down(activation(up(x)))."""

    tp_plan: ClassVar[dict[str, str]] = {"up_proj": "colwise", "down_proj": "rowwise"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.d_ff is not None  # resolved
        self.up_proj = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.activation: nn.Module = component("activation", config)()
        self.down_proj = ResidualProjection(config.d_ff, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))  # (B, T, C) -> (B, T, F) -> (B, T, C)

    def flops(self, seq_len: int) -> dict[str, float]:
        return {"ffn": 2 * (self.up_proj.weight.numel() + self.down_proj.weight.numel())}

    def config_values(self) -> dict[str, Any]:
        return {"d_ff": self.down_proj.in_features, "bias": self.down_proj.bias is not None}


class SwiGLU(PlacesWeights):
    """down(activation(gate(x)) * up(x)) with SiLU as the activation. Shazeer 2020."""

    tp_plan: ClassVar[dict[str, str]] = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    kernel_family = "swiglu"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.d_ff is not None and config.activation is not None  # resolved
        self.activation_name = config.activation
        self.kernel: Any = load_kernels(self.kernel_family) if config.kernels == "triton" else None
        self.gate_proj = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.up_proj = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.activation: nn.Module = component("activation", config)()
        self.down_proj = ResidualProjection(config.d_ff, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = joint_linear(x, self.gate_proj, self.up_proj)  # (B, T, F) each
        return self.down_proj(self.gate(gate, up))

    def place_weights(self, device: torch.device) -> None:
        if device.type == "cuda":  # one product of this size is slower on a CPU
            place_adjacent(self.gate_proj, self.up_proj)

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """activation(gate) * up, (B, T, F) each."""
        if self.kernel is not None:
            return self.kernel.gated(gate, up, self.activation_name)
        return self.activation(gate) * up

    def flops(self, seq_len: int) -> dict[str, float]:
        return {"ffn": 2 * (self.gate_proj.weight.numel() + self.up_proj.weight.numel()
                            + self.down_proj.weight.numel())}

    def config_values(self) -> dict[str, Any]:
        return {"d_ff": self.down_proj.in_features, "bias": self.down_proj.bias is not None}


class GEGLU(SwiGLU):
    """The same with GELU: exact (Shazeer 2020) or the tanh approximation (Gemma)."""


class ReGLU(SwiGLU):
    """The same with ReLU. Shazeer 2020."""


# ---------------------------------------------------------------- the output head


class OutputHead(nn.Linear):
    """Logits from the residual stream: scale * W x + b, then softcap * tanh(logits / softcap) if a softcap is set.

    scale: the factor that the initialisation needs (muP), times logit_scale (Granite). b: Phi. softcap: Gemma 2.
    loss_chunk: tokens per chunk of the loss; 0: not by chunks.
    """

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__(config.n_embd, config.vocab_size, bias=config.head_bias)
        assert isinstance(config.loss_chunk, int)  # resolved
        self.logit_scale, self.softcap, self.loss_chunk = config.logit_scale, config.logit_softcap, config.loss_chunk
        self.scale = scale * config.logit_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return softcap(super().forward(self.scaled(x)), self.softcap)  # (B, T, C) -> (B, T, V)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.scale == 1.0 else x * self.scale

    def loss(self, h: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy in nats, computed in float32; of more than loss_chunk tokens, by chunks of so many.

        Args:
            h: (B, T, C).
            targets: (B, T) int64; -1 is ignored.
            reduction: "mean" over the targets that are not ignored, "sum", or "none": (B, T), 0 where ignored.
        """
        if 0 < self.loss_chunk < targets.numel():
            return self.chunked_loss(h, targets, reduction)
        losses = nn.functional.cross_entropy(self(h).flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                                             reduction=reduction)
        return losses.view(targets.shape) if reduction == "none" else losses

    def chunked_loss(self, h: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """`loss` that holds the logits of one chunk. They are computed twice if W is sharded, or b exists."""
        x, y = h.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        if torch.is_grad_enabled() and reduction != "none" and not is_dtensor(self.weight) and (
                self.bias is None):
            return linear_cross_entropy(self.scaled(x), self.weight, y, self.loss_chunk, self.softcap, reduction)
        losses = recomputed_cross_entropy(self, x, y, self.loss_chunk)
        if reduction == "none":
            return losses.view(targets.shape)
        return losses.sum() / (y != -1).sum() if reduction == "mean" else losses.sum()

    def flops(self, seq_len: int) -> dict[str, float]:
        return {"output head": 2 * self.weight.numel()}

    def config_values(self) -> dict[str, Any]:
        return {"vocab_size": self.weight.shape[0], "logit_softcap": self.softcap, "logit_scale": self.logit_scale,
                "head_bias": self.bias is not None, "loss_chunk": self.loss_chunk}


def softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(x / cap), nearly x where |x| is far below cap; x itself if cap is None."""
    return x if cap is None else torch.tanh(x / cap) * cap
