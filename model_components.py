"""The parts a transformer is built from, one class for each option of the axis tables in `model_config.py`.

Here: norms, where they stand, activations, FFNs, what mixes into the residual stream. Positions, attention and
initialisation have rooms of their own, `model_positions.py`, `model_attention.py`, `model_init.py`.
One call signature per axis:

    norm          Norm(config, dim)(x)                    -> x
    norm_position Residual(config)(x, sublayer)           -> x      (owns its norms; `final_norm`: one more at the end?)
    activation    Activation()(x)                         -> x
    ffn           FFN(config)(x)                          -> x
    position      Position(config): .embed(x, positions), .tables(positions, window), .rotate(q, k, tables), .slopes()
    attention     Attention(config, layer)(x, rotate, mask, cache, value_embedding) -> x

Shapes: B batch, T time, S keys, C channels = n_embd, H query heads, G key/value heads, D head_dim, F d_ff.

A part that multiplies matrices states its forward cost in `flops(seq_len)`: {account: FLOPs per token}, a
multiply-add counting as two. Parameters start by `model_init.py`'s rules, unless a part's `start` gives them a
constant. Linear layers whose output joins the residual stream are `ResidualProjection`s, whatever part holds them.
Under tensor parallelism a part is split as its `tp_plan` says (see training/parallel.py); one without a plan does
the same work on every process.
To add a part: write its class here, name it in the axis table, test it in tests/test_model_components.py.
"""

import importlib

import torch
import torch.nn as nn
from torch.nn import GELU, LeakyReLU, ReLU, SiLU  # noqa: F401  (named by the axis table)

import model_config


def component(axis, config):
    """The class that the axis tables name for `config`'s choice on `axis`."""
    room = importlib.import_module(model_config.ROOMS.get(axis, "model_components"))
    return getattr(room, model_config.AXES[axis][getattr(config, axis)].cls)


def build_norm(config, dim=None):
    """A norm of the kind that `config` chooses, over a last dimension of `dim` (n_embd by default)."""
    return component("normalization", config)(config, dim or config.n_embd)


class ResidualProjection(nn.Linear):
    """A linear layer that writes to the residual stream."""


# ---------------------------------------------------------------- norms


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension. Ba et al. 2016."""

    def __init__(self, config, dim):
        super().__init__(dim, eps=config.norm_eps)


class LayerNormNoBias(nn.LayerNorm):
    """LayerNorm without the shift."""

    def __init__(self, config, dim):
        super().__init__(dim, eps=config.norm_eps, bias=False)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension. Zhang & Sennrich 2019."""

    def __init__(self, config, dim):
        super().__init__(dim, eps=config.norm_eps)


class GemmaRMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) * (1 + weight): weight decay pulls the gain to one. Gemma Team 2024."""

    init_constants = {"weight": 0.0}

    def __init__(self, config, dim):
        super().__init__(dim, eps=config.norm_eps)

    def forward(self, x):
        return nn.functional.rms_norm(x, self.normalized_shape, 1.0 + self.weight, self.eps)


class DynamicTanh(nn.Module):
    """tanh(alpha x) * weight + bias: squashes as a norm does, without its statistics. Zhu et al. 2025."""

    init_constants = {"alpha": 0.5}

    def __init__(self, config, dim):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        return torch.tanh(self.alpha * x) * self.weight + self.bias


# ---------------------------------------------------------------- where the norm stands


class PreNorm(nn.Module):
    """x + sublayer(norm(x)). The stream itself is never normalised, so the head needs a norm before it.

    Also the base of the others: `branch` is what a sublayer adds, `join` how. residual_scale multiplies what is
    added, as in Granite.
    """

    final_norm = True

    def __init__(self, config):
        super().__init__()
        self.norm = build_norm(config)
        self.scale = config.residual_scale

    def branch(self, x, sublayer):
        return sublayer(self.norm(x))

    def join(self, x, y):
        return x + (y if self.scale == 1.0 else y * self.scale)

    def forward(self, x, sublayer):
        return self.join(x, self.branch(x, sublayer))


class PostNorm(PreNorm):
    """norm(x + sublayer(x)). Vaswani et al. 2017."""

    final_norm = False

    def branch(self, x, sublayer):
        return sublayer(x)

    def join(self, x, y):
        return self.norm(super().join(x, y))


class SandwichNorm(PreNorm):
    """x + norm(sublayer(norm(x))). Ding et al. 2021; Gemma 2."""

    def __init__(self, config):
        super().__init__(config)
        self.norm_after = build_norm(config)

    def branch(self, x, sublayer):
        return self.norm_after(sublayer(self.norm(x)))


class ReorderedNorm(PreNorm):
    """x + norm(sublayer(x)). OLMo 2 (2025), after Swin v2."""

    def branch(self, x, sublayer):
        return self.norm(sublayer(x))


class X0Mix(nn.Module):
    """stream * x + first * x0: the embeddings x0 mixed back in before a block, at first not at all. modded-nanogpt."""

    init_constants = {"stream": 1.0, "first": 0.0}

    def __init__(self):
        super().__init__()
        self.stream = nn.Parameter(torch.empty(1))
        self.first = nn.Parameter(torch.empty(1))

    def forward(self, x, x0):
        return self.stream * x + self.first * x0


# ---------------------------------------------------------------- activations and FFNs


class GELUTanh(nn.GELU):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))."""

    def __init__(self):
        super().__init__(approximate="tanh")


class ReLU2(nn.Module):
    """max(x, 0)². So et al. 2021 (Primer)."""

    def forward(self, x):
        return nn.functional.relu(x).square()


class StandardFFN(nn.Module):
    """down(activation(up(x)))."""

    tp_plan = {"up_proj": "columns", "down_proj": "rows"}

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.activation = component("activation", config)()
        self.down_proj = ResidualProjection(config.d_ff, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down_proj(self.activation(self.up_proj(x)))  # (B, T, C) -> (B, T, F) -> (B, T, C)

    def flops(self, seq_len):
        return {"ffn": 2 * (self.up_proj.weight.numel() + self.down_proj.weight.numel())}


class SwiGLU(nn.Module):
    """down(activation(gate(x)) * up(x)), the activation being SiLU. Shazeer 2020."""

    tp_plan = {"gate_proj": "columns", "up_proj": "columns", "down_proj": "rows"}

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.up_proj = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.activation = component("activation", config)()
        self.down_proj = ResidualProjection(config.d_ff, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) inside

    def flops(self, seq_len):
        return {"ffn": 2 * (self.gate_proj.weight.numel() + self.up_proj.weight.numel()
                            + self.down_proj.weight.numel())}


class GEGLU(SwiGLU):
    """The same with GELU, exact (Shazeer 2020) or by tanh (Gemma)."""


class ReGLU(SwiGLU):
    """The same with ReLU. Shazeer 2020."""


# ---------------------------------------------------------------- the output head


class OutputHead(nn.Linear):
    """Logits from the residual stream: scale * W x, then softcap * tanh(logits / softcap) where there is one.

    scale: a factor that the initialisation asks for (muP). softcap: Gemma 2.
    """

    def __init__(self, config, scale):
        super().__init__(config.n_embd, config.vocab_size, bias=False)
        self.scale, self.softcap = scale, config.logit_softcap

    def forward(self, x):
        logits = super().forward(x if self.scale == 1.0 else x * self.scale)  # (B, T, C) -> (B, T, V)
        return softcap(logits, self.softcap)

    def flops(self, seq_len):
        return {"output head": 2 * self.weight.numel()}


def softcap(x, cap):
    """cap * tanh(x / cap), nearly x where |x| is far below cap; x itself without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap
