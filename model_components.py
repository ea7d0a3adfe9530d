"""The parts a transformer is built from, one class for each option of the axis tables in `model_config.py`.

One call signature per axis:

    norm          Norm(config)(x)                        -> x
    norm_position Residual(config)(x, sublayer)          -> x      (owns the norm; `final_norm`: one more at the end?)
    activation    Activation()(x)                        -> x
    ffn           FFN(config)(x)                         -> x
    position      Position(config): .embed(x, positions), .tables(positions), .rotate(q, k, tables)
    attention     Attention(config)(x, rotate, cache)    -> x

Shapes: B batch, T time, C channels = n_embd, H query heads, G key/value heads, D head_dim, F d_ff.

A part that multiplies matrices states its forward cost in `flops(seq_len)`: {account: FLOPs per token},
a multiply-add counting as two; `model_flops.py` adds them up. Linear layers whose output joins the
residual stream are `ResidualProjection`s, so that initialisation finds them whatever the part.
To add a part: write its class here, name it in the axis table, test it in tests/test_model_components.py.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn import GELU, LeakyReLU, ReLU, SiLU  # noqa: F401  (named by the axis table)

import model_config


def component(axis, config):
    """The class that the axis tables name for `config`'s choice on `axis`."""
    return globals()[model_config.AXES[axis][getattr(config, axis)].cls]


class ResidualProjection(nn.Linear):
    """A linear layer that writes to the residual stream: its initial weights are scaled by 1/sqrt(2 n_layer)."""


# ---------------------------------------------------------------- norms


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension. Ba et al. 2016."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.norm_eps)


class LayerNormNoBias(nn.LayerNorm):
    """LayerNorm without the shift."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=False)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension. Zhang & Sennrich 2019."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.norm_eps)


# ---------------------------------------------------------------- where the norm stands


class PreNorm(nn.Module):
    """x + sublayer(norm(x)). The stream itself is never normalised, so the head needs a norm before it."""

    final_norm = True

    def __init__(self, config):
        super().__init__()
        self.norm = component("normalization", config)(config)

    def forward(self, x, sublayer):
        return x + sublayer(self.norm(x))


class PostNorm(nn.Module):
    """norm(x + sublayer(x)). Vaswani et al. 2017."""

    final_norm = False

    def __init__(self, config):
        super().__init__()
        self.norm = component("normalization", config)(config)

    def forward(self, x, sublayer):
        return self.norm(x + sublayer(x))


# ---------------------------------------------------------------- activations and FFNs


class GELUTanh(nn.GELU):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))."""

    def __init__(self):
        super().__init__(approximate="tanh")


class StandardFFN(nn.Module):
    """down(activation(up(x)))."""

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
    """down(silu(gate(x)) * up(x)). Shazeer 2020."""

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


# ---------------------------------------------------------------- positions


class NoPositions(nn.Module):
    """Nothing is added and nothing rotated: the causal mask alone tells order. Haviv et al. 2022.

    Also the base of the others; each overrides the step at which it acts. `positions` is (T,) int64.
    `tables` is computed once a forward pass and handed to every layer's `rotate`.
    """

    max_positions = None  # a bound on the position that can be encoded, if there is one

    def __init__(self, config):
        super().__init__()

    def embed(self, x, positions):
        return x

    def tables(self, positions):
        return None

    def rotate(self, q, k, tables):
        return q, k


class LearnedAbsolutePositions(NoPositions):
    """A trained vector per position, added to the token embedding. Radford et al. 2019."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.block_size, config.n_embd)
        self.max_positions = config.block_size

    def embed(self, x, positions):
        return x + self.embedding(positions)  # (B, T, C) + (T, C)


class RotaryPositions(NoPositions):
    """Each pair (x_i, x_{i + D/2}) of a query or key turned by position * theta^(-2i/D). Su et al. 2021.

    The halves are paired as in LLaMA's released Hugging Face weights. Angles are float32 in every precision.
    """

    def __init__(self, config):
        super().__init__(config)
        self.theta, self.head_dim = config.rope_theta, config.head_dim

    def tables(self, positions):
        pair = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)  # (D/2,)
        angles = torch.outer(positions.float(), self.theta ** (-pair / self.head_dim))  # (T, D/2)
        return angles.cos(), angles.sin()

    def rotate(self, q, k, tables):
        cos, sin = (t.to(q.dtype) for t in tables)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    @staticmethod
    def _turn(x, cos, sin):
        a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---------------------------------------------------------------- attention


class KVCache:
    """Keys and values of the tokens so far, for one layer: (B, G, max_len, D) each, filled from the left."""

    def __init__(self):
        self.k = self.v = None
        self.length = 0

    def append(self, k, v, max_len):
        """Store k, v (B, G, T, D) behind what is there; return all keys and values (B, G, length, D)."""
        if self.k is None:
            self.k = k.new_empty(*k.shape[:2], max_len, k.shape[3])
            self.v = torch.empty_like(self.k)
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class SDPAttention(nn.Module):
    """Causal self-attention, softmax(q k^T / sqrt(D)) v; the product left to torch's fused kernels.

    n_kv_head < n_head shares each key/value head among n_head / n_kv_head query heads (Ainslie 2023).
    """

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.block_size, self.dropout = config.block_size, config.dropout
        kv_dim = self.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=config.bias)
        self.k_proj = nn.Linear(config.n_embd, kv_dim, bias=config.bias)
        self.v_proj = nn.Linear(config.n_embd, kv_dim, bias=config.bias)
        self.o_proj = ResidualProjection(self.n_head * self.head_dim, config.n_embd, bias=config.bias)

    def forward(self, x, rotate, cache=None):
        """x (B, T, C); rotate(q, k) -> q, k; cache: a `KVCache` to extend, when generating."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        q, k = rotate(q, k)
        if cache is not None:
            k, v = cache.append(k, v, self.block_size)
        y = self.attend(q, k, v)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))

    def attend(self, q, k, v):
        T, S = q.shape[2], k.shape[2]  # S > T: the first S - T keys come from the cache
        mask = None if T == S or T == 1 else q.new_ones(T, S, dtype=torch.bool).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S,
                                              dropout_p=self.dropout if self.training else 0.0,
                                              enable_gqa=self.n_kv_head != self.n_head)

    def flops(self, seq_len):
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return {"attention projections": 2 * sum(p.weight.numel() for p in projections),
                "attention scores": 4 * seq_len * self.n_head * self.head_dim}  # q k^T and p v, masked half included


class ManualAttention(SDPAttention):
    """The same attention written out, to be read and to be tested against."""

    def attend(self, q, k, v):
        T, S = q.shape[2], k.shape[2]
        if self.n_kv_head != self.n_head:
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5  # (B, H, T, S)
        future = q.new_ones(T, S, dtype=torch.bool).triu(S - T + 1)
        p = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        return F.dropout(p, self.dropout, self.training) @ v
