"""Attention: the mask, the backends that compute the products, the attention modules, the KV cache.

A backend is a stateless object. It turns an `AttentionMaskSpec`, which says which keys are visible, into the mask that
its kernel takes (`mask`, once per forward pass for all layers with the same window), and computes
softmax(cap(scale * q k^T) + ALiBi bias, over the visible keys) v (`attend`). An attention module has projections and a
cache, states its FLOPs, and holds any backend. To add a backend: a subclass of `ManualBackend` with `mask`, `attend`
and `computed_keys`, and a line in its table with the keys it does not support. To add an attention: a subclass of
`Attention`, and a line in its table; tests/model/test_seams.py has an example. Shapes as in model_components.py.
"""

import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model_components import (
    PlacesWeights,
    ResidualProjection,
    build_norm,
    component,
    joint_linear,
    place_adjacent,
    softcap,
)
from model_config import ModelConfig
from model_positions import RotaryEmbedding

AlibiArguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

# ---------------------------------------------------------------- masks


class AttentionMaskSpec(typing.NamedTuple):
    """Which keys the queries of one forward pass see, in all layers with one window.

    queries: (T,) int64, their positions.
    keys: (S,) int64, their positions; the last T are those of the queries.
    window: as `ModelConfig.window`.
    causal: no query sees a later key.
    documents: (B, T) int64, the id of each token's document; None: one document.
    alibi_slopes: (H,) float32.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    window: int | None
    causal: bool
    documents: torch.Tensor | None
    alibi_slopes: torch.Tensor | None

    def is_visible(self, distance: torch.Tensor) -> torch.Tensor:
        """Whether a query sees a key: bool, the shape of `distance` = query's position - key's position."""
        visible = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            visible = visible & (distance < self.window) & (distance > -self.window)
        return visible

    def is_causal_only(self) -> bool:
        """Whether the mask is exactly the causal triangle, for which kernels need no mask tensor."""
        T, S = len(self.queries), len(self.keys)
        return self.causal and T == S and self.documents is None and (self.window is None or self.window >= S)

    def is_full(self) -> bool:
        """Whether every query sees every key: when decoding one token, or without a mask."""
        T, S = len(self.queries), len(self.keys)
        return self.documents is None and (self.window is None or self.window >= S) and (T == 1 or not self.causal)

    def bool_mask(self) -> torch.Tensor | None:
        """(T, S) or (B, 1, T, S) bool, True where a query sees a key; None if every query sees every key."""
        if self.is_full():
            return None
        visible = self.is_visible(self.queries[:, None] - self.keys[None, :])  # (T, S)
        if self.documents is not None:
            same = self.documents[:, :, None] == self.documents[:, None, :]  # (B, T, T)
            visible = (visible & same)[:, None]
        return visible

    def bias(self) -> torch.Tensor | None:
        """(H, T, S) float32, added to the scores; None without ALiBi."""
        if self.alibi_slopes is None:
            return None
        distance = (self.queries[:, None] - self.keys[None, :]).abs()
        return -self.alibi_slopes[:, None, None] * distance


# ---------------------------------------------------------------- the backends


class ManualBackend:
    """Attention written out: the readable reference, and the base of the other backends.

    Backends have no state and no parameters, so one object may serve every layer. With fewer key/value heads G than
    query heads H, H / G query heads use one of them (Ainslie 2023). The width of v may differ from that of q and k.
    """

    def mask(self, spec: AttentionMaskSpec) -> typing.Any:
        """What `attend` takes as its mask; each backend has its own. Here (bool mask, bias)."""
        return spec.bool_mask(), spec.bias()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: typing.Any, scale: float,
               cap: float | None = None, dropout_p: float = 0.0) -> torch.Tensor:
        """The attention product.

        Args:
            q, k, v: (B, H, T, D), (B, G, S, D), (B, G, S, D_v).
            mask: of this backend, for a spec of T queries and S keys.
            scale: factor on q k^T.
            cap: softcap of the scaled scores.
            dropout_p: dropout on the attention weights.

        Returns:
            (B, H, T, D_v).
        """
        bool_mask, bias = mask
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = softcap(q @ k.transpose(-2, -1) * scale, cap)  # (B, H, T, S)
        if bias is not None:
            scores = scores + bias
        if bool_mask is not None:
            scores = scores.masked_fill(~bool_mask, float("-inf"))
        p = scores.softmax(dim=-1).to(v.dtype)
        return F.dropout(p, dropout_p) @ v

    def kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: typing.Any, scale: float,
               dropout_p: float = 0.0) -> str | None:
        """The name of the kernel that torch chooses for these arguments of `attend`; None if there is only one."""
        return None

    def computed_keys(self, seq_len: int, window: int | None, causal: bool) -> float:
        """Keys per query that this backend computes, on average, masked ones included."""
        return seq_len


class SDPABackend(ManualBackend):
    """torch's scaled_dot_product_attention; torch chooses one of its fused kernels. Does not support a softcap."""

    def mask(self, spec: AttentionMaskSpec) -> tuple[torch.Tensor | None, bool]:
        """(attn_mask or None, is_causal) of scaled_dot_product_attention."""
        bias = spec.bias()
        if spec.is_causal_only() and bias is None:
            return None, True
        bool_mask = spec.bool_mask()
        if bias is None:
            return bool_mask, False
        bias = bias[None]  # (1, H, T, S): the fused kernels take masks of two or four dimensions, not of three
        return bias if bool_mask is None else bias.masked_fill(~bool_mask, float("-inf")), False

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: tuple[torch.Tensor | None, bool],
               scale: float, cap: float | None = None, dropout_p: float = 0.0) -> torch.Tensor:
        assert cap is None
        return self._call(F.scaled_dot_product_attention, q, k, v, mask, scale, dropout_p)

    def _call(self, function: Callable[..., typing.Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              mask: tuple[torch.Tensor | None, bool], scale: float, dropout_p: float) -> typing.Any:
        """`function` with the arguments of scaled_dot_product_attention."""
        attn_mask, is_causal = mask
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(q.dtype)
        return function(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p,
                        enable_gqa=k.shape[1] != q.shape[1])

    def kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: tuple[torch.Tensor | None, bool],
               scale: float, dropout_p: float = 0.0) -> str:
        name: str = SDPBackend(self._call(torch._fused_sdp_choice, q, k, v, mask, scale, dropout_p)).name
        return name.lower()


class FlexBackend(ManualBackend):
    """torch's flex_attention (Dong et al. 2024). It skips masked blocks. No dropout; trains only on CUDA."""

    BLOCK = 128  # flex_attention's default

    def mask(self, spec: AttentionMaskSpec) -> tuple[BlockMask | None, AlibiArguments]:
        """(block mask, or None if every query sees every key; the spec's queries, keys and alibi_slopes)."""
        alibi = (spec.queries, spec.keys, spec.alibi_slopes)
        if spec.is_full():
            return None, alibi
        T, S, device = len(spec.queries), len(spec.keys), spec.queries.device
        if spec.documents is None:
            return cached_block_mask(T, S, spec.window, spec.causal, device), alibi
        documents = spec.documents

        def mask_mod(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return spec.is_visible(i - j) & (documents[b, i] == documents[b, j])

        return block_mask(mask_mod, documents.shape[0], T, S, device), alibi

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: tuple[BlockMask | None, AlibiArguments],
               scale: float, cap: float | None = None, dropout_p: float = 0.0) -> torch.Tensor:
        assert not dropout_p
        blocks, (queries, keys, alibi_slopes) = mask

        def score_mod(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor,
                      j: torch.Tensor) -> torch.Tensor:
            score = softcap(score, cap)
            return score if alibi_slopes is None else score - alibi_slopes[h] * (queries[i] - keys[j]).abs()

        needs_score_mod = cap is not None or alibi_slopes is not None
        kernel: Callable[..., typing.Any] = flex_attention
        if q.is_cuda:
            kernel = compile_once(flex_attention)
        return kernel(q, k, v, score_mod=score_mod if needs_score_mod else None, block_mask=blocks, scale=scale,
                      enable_gqa=k.shape[1] != q.shape[1])

    def computed_keys(self, seq_len: int, window: int | None, causal: bool) -> float:
        """Keys in the computed blocks: for a block of queries, every block with a key that one of the queries sees."""
        blocks = -(-seq_len // self.BLOCK)
        back = blocks if window is None else -(-(window - 1) // self.BLOCK)
        computed = sum(min(i, back) + (1 if causal else 1 + min(blocks - 1 - i, back)) for i in range(blocks))
        return min(seq_len, computed * self.BLOCK / blocks)


def block_mask(mask_mod: Callable[..., torch.Tensor], B: int | None, T: int, S: int, device: torch.device) -> BlockMask:
    """flex_attention's mask of whole blocks, compiled on CUDA."""
    create = compile_once(create_block_mask) if device.type == "cuda" else create_block_mask
    return create(mask_mod, B, None, T, S, device=device)


@functools.lru_cache(maxsize=32)
def cached_block_mask(T: int, S: int, window: int | None, causal: bool, device: torch.device) -> BlockMask:
    """The block mask of T queries that are the last of S tokens. It depends on nothing else, so it is built once."""
    nothing = torch.empty(0, dtype=torch.int64)
    spec = AttentionMaskSpec(nothing, nothing, window, causal, None, None)

    def mask_mod(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return spec.is_visible(i + (S - T) - j)

    return block_mask(mask_mod, None, T, S, device)


@functools.cache
def compile_once(function: Callable[..., typing.Any]) -> Callable[..., typing.Any]:
    """torch.compile(function), the same object at every call. In a compiled model it is traced as part of the model."""
    return torch.compile(function)


# ---------------------------------------------------------------- what goes down the blocks


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """What one forward pass gives to every block besides the residual stream.

    positions: (T,) int64, of the tokens.
    cos_sin: {window: what `NoPositions.cos_sin` gives for the layers with this window}.
    masks: {window: the backend's mask for the layers with this window}.
    caches: one cache per layer, made by its attention's `new_cache`, when generating.
    segment_ids: (B, T) int64, the document of each token, where documents are masked from each other.
    x0: (B, T, C), the embeddings, for x0_mix.
    value_embeddings: (B, T, G D) for each table.
    """

    positions: torch.Tensor
    cos_sin: dict[int | None, typing.Any] = field(default_factory=dict)
    masks: dict[int | None, typing.Any] = field(default_factory=dict)
    caches: list[typing.Any] | None = None
    segment_ids: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    value_embeddings: list[torch.Tensor] = field(default_factory=list)


# ---------------------------------------------------------------- attention modules


class Attention(nn.Module):
    """What every attention module has, whatever its projections: a window, a backend, a cache, the FLOPs of the scores.

    A subclass has a `forward` with projections and `attend`, and adds the FLOPs of its projections to `flops`. It
    overrides `new_cache` to store something other than keys and values.
    """

    def __init__(self, config: ModelConfig, layer: int, n_kv_head: int, d_qk: int, d_v: int) -> None:
        """The attention of layer `layer` (from 0).

        Args:
            config: resolved.
            layer: index of the layer.
            n_kv_head: key/value heads that the backend gets.
            d_qk, d_v: widths of a head's queries and keys, and of its values.
        """
        super().__init__()
        assert config.head_dim is not None  # resolved
        self.layer, self.n_head, self.n_kv_head, self.d_qk, self.d_v = layer, config.n_head, n_kv_head, d_qk, d_v
        self.block_size, self.dropout, self.causal = config.block_size, config.dropout, config.causal
        self.window, self.softcap = config.window(layer), config.attn_softcap
        self.backend: ManualBackend = component("attention_backend", config)()
        self.default_scale: float = component("init", config)(config).attention_scale() * (config.head_dim / d_qk)**0.5
        self.scale = config.attn_scale or self.default_scale

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        raise NotImplementedError

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`ManualBackend.attend` of this layer; q (B, H, T, d_qk), k (B, G, S, d_qk), v (B, G, S, d_v)."""
        return self.backend.attend(q, k, v, context.masks[self.window], self.scale, self.softcap,
                                   self.dropout if self.training else 0.0)

    def new_cache(self) -> "LayerCache":
        """An empty cache for this layer, for `ForwardContext.caches`."""
        return KVCache(self.window)

    def kernel(self, spec: AttentionMaskSpec, dtype: torch.dtype) -> str | None:
        """The name of the kernel that torch chooses for training with this mask; None if the backend has only one."""
        q, k, v = (torch.empty(1, heads, len(spec.queries), width, dtype=dtype, device=spec.queries.device,
                               requires_grad=True)  # the choice may depend on gradients
                   for heads, width in ((self.n_head, self.d_qk), (self.n_kv_head, self.d_qk),
                                        (self.n_kv_head, self.d_v)))
        return self.backend.kernel(q, k, v, self.backend.mask(spec), self.scale, self.dropout)

    def flops(self, seq_len: int) -> dict[str, float]:
        """FLOPs per token of the scores as the backend computes them, masked ones included."""
        return {"attention scores": self._score_flops(self.backend.computed_keys(seq_len, self.window, self.causal))}

    def credited_flops(self, seq_len: int, convention: str) -> dict[str, float]:
        """`flops` with the scores of the keys that a convention counts, see `credited_keys`."""
        keys = credited_keys(seq_len, self.window, self.causal, convention)
        return {**self.flops(seq_len), "attention scores": self._score_flops(keys)}

    def _score_flops(self, keys: float) -> float:
        """FLOPs of q k^T and p v for one query and `keys` keys."""
        return 2 * keys * self.n_head * (self.d_qk + self.d_v)

    def config_values(self) -> dict[str, typing.Any]:
        return {"n_head": self.n_head, "attn_scale": None if self.scale == self.default_scale else self.scale,
                "attn_softcap": self.softcap, "causal": self.causal, "dropout": self.dropout,
                "block_size": self.block_size}


class StandardAttention(PlacesWeights, Attention):
    """Multi-head self-attention; n_head / n_kv_head query heads use one key/value head (Vaswani 2017, Ainslie 2023)."""

    tp_plan: typing.ClassVar[dict[str, str]] = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise",
                                                "o_proj": "rowwise", "qk_norm": "headwise", "value_mix": "headwise"}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        assert config.n_kv_head is not None and config.head_dim is not None and config.qkv_bias is not None  # resolved
        super().__init__(config, layer, config.n_kv_head, d_qk=config.head_dim, d_v=config.head_dim)
        self.head_dim, self.value_table = config.head_dim, config.value_table(layer)
        self.rotates = config.rope_letters()[layer] == "R"
        kv_dim = self.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_dim, bias=config.qkv_bias)
        self.qk_norm: NoQKNorm = component("qk_norm", config)(config)
        self.rotary = RotaryEmbedding(config)
        self.value_mix = None if self.value_table is None else ValueMix()
        self.gate: NoGate = component("attn_gate", config)(config)
        self.o_proj = ResidualProjection(self.n_head * self.head_dim, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = (projected.reshape(B, T, -1, self.head_dim)  # -1: all heads, or this rank's under tensor parallelism
                   for projected in joint_linear(x, self.q_proj, self.k_proj, self.v_proj))
        cos_sin = context.cos_sin[self.window] if self.rotates else None
        if cos_sin is not None and not self.qk_norm.saves_input:
            v = v.contiguous()  # else v alone would keep the joint product, three times as large, for the backward pass
        q, k = self.qk_norm(q, k)
        if self.value_mix is not None and self.value_table is not None:
            v = self.value_mix(v, context.value_embeddings[self.value_table].view(v.shape))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, T, D) twice
        q, k = self.rotary(q, k, cos_sin)
        if context.caches is not None:
            k, v = context.caches[self.layer].append(k, v, self.block_size)  # (B, G, S, D)
        y = self.attend(q, k, v, context)
        return self.o_proj(self.gate(y.transpose(1, 2), x).flatten(2))  # (B, T, H, D) -> (B, T, C)

    def place_weights(self, device: torch.device) -> None:
        if device.type == "cuda":  # one product is 2 % slower than three on a CPU
            place_adjacent(self.q_proj, self.k_proj, self.v_proj)

    def flops(self, seq_len: int) -> dict[str, float]:
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return {"attention projections": 2 * sum(p.weight.numel() for p in projections), **super().flops(seq_len),
                **self.gate.flops(seq_len)}

    def config_values(self) -> dict[str, typing.Any]:
        return {**super().config_values(), "n_head": self.q_proj.out_features // self.head_dim,
                "n_kv_head": self.k_proj.out_features // self.head_dim, "head_dim": self.head_dim,
                "qkv_bias": self.q_proj.bias is not None, "bias": self.o_proj.bias is not None}


def credited_keys(seq_len: int, window: int | None, causal: bool, convention: str) -> float:
    """Keys per query by a convention: "PaLM" counts all in the layer's span, "causal" those that are not masked.

    The causal mean omits the half key of the diagonal, as the convention that halves the scores does.
    """
    span = min(seq_len, window or seq_len)
    if not causal:
        return min(seq_len, 2 * span - 1) if window else seq_len
    return span if convention == "PaLM" else span - span * span / (2 * seq_len)


# ---------------------------------------------------------------- QK norm, gates, value embeddings


class NoQKNorm(nn.Module):
    """Queries (B, T, H, D) and keys (B, T, G, D) unchanged.

    Attributes:
        across_heads: whether the norm mixes heads.
        saves_input: whether its backward pass needs what it was given.
    """

    across_heads, saves_input = False, False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q, k


class QKNormPerHead(NoQKNorm):
    """Each head normalised over its D channels, with one gain for all heads. Henry et al. 2020; Qwen3, Gemma 3."""

    saves_input = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q_norm = build_norm(config, config.head_dim)
        self.k_norm = build_norm(config, config.head_dim)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_norm(q), self.k_norm(k)


class QKNormProjection(NoQKNorm):
    """All heads normalised as one vector of H D channels. OLMo 2."""

    across_heads, saves_input = True, True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.n_kv_head is not None and config.head_dim is not None  # resolved
        self.q_norm = build_norm(config, config.n_head * config.head_dim)
        self.k_norm = build_norm(config, config.n_kv_head * config.head_dim)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)


class NoGate(nn.Module):
    """The output of attention, y (B, T, H, D), unchanged; x (B, T, C) is the input of attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y

    def flops(self, seq_len: int) -> dict[str, float]:
        return {}


class ElementwiseGate(NoGate):
    """y * sigmoid(W x), one gate per channel of each head. Qiu et al. 2025."""

    tp_plan: typing.ClassVar[dict[str, str]] = {"gate_proj": "colwise"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.head_dim is not None  # resolved
        self.gate_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y * self.gate_proj(x).sigmoid().view(y.shape)

    def flops(self, seq_len: int) -> dict[str, float]:
        return {"attention gate": 2 * self.gate_proj.weight.numel()}


class HeadwiseGate(ElementwiseGate):
    """y * sigmoid(W x), one gate per head. Qiu et al. 2025."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.n_embd, config.n_head, bias=config.bias)

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y * self.gate_proj(x).sigmoid().unsqueeze(-1)  # (B, T, H, 1)


class ValueMix(nn.Module):
    """own * v + other * e: a layer's values and the tokens' value embeddings, both (B, T, G, D). modded-nanogpt."""

    init_constants: typing.ClassVar[dict[str, float]] = {"own": 0.5, "other": 0.5}

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.empty(1))
        self.other = nn.Parameter(torch.empty(1))

    def forward(self, v: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return self.own.to(v.dtype) * v + self.other.to(v.dtype) * e.to(v.dtype)


# ---------------------------------------------------------------- generation


class LayerCache(typing.Protocol):
    """What one layer stores of the tokens so far. Each attention reads and writes its own; the model reads `length`.

    length: tokens seen so far. A layer with a window uses the last window - 1 of them, and only these.
    """

    length: int


class KVCache:
    """Keys and values of the tokens so far, for one layer: (B, G, S, D) and (B, G, S, D_v).

    Without a window they fill a buffer of max_len from the left. With one, only the last window - 1 are stored: those
    that the next token sees. length: tokens seen so far.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.length = 0

    def append(self, k: torch.Tensor, v: torch.Tensor, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, G, T, D) after the entries so far; return the keys and values that these T tokens may see."""
        end = self.length + k.shape[2]
        if self.window is not None:
            if self.k is not None and self.v is not None:
                k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
            first = max(0, k.shape[2] - (self.window - 1))
            self.k, self.v = k[:, :, first:], v[:, :, first:]
            if first > self.window:  # a slice would keep all of a long prompt in memory
                self.k, self.v = self.k.clone(), self.v.clone()
        else:
            if self.k is None or self.v is None:
                self.k = k.new_empty(*k.shape[:2], max_len, k.shape[3])
                self.v = v.new_empty(*v.shape[:2], max_len, v.shape[3])
            self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
            k, v = self.k[:, :, :end], self.v[:, :, :end]
        self.length = end
        return k, v
