"""Attention: projections, what queries may see, the backends that do the products, the cache of generation.

All backends compute the same: softmax(cap(scale * q k^T) + ALiBi, over the keys in sight) v. What is in sight is said
once, in `AttentionMaskSpec`; a backend turns it into the mask that its kernel takes (`mask`, once a forward pass for each kind of
layer) and does the products (`attend`). To add a backend: a subclass of `ManualAttention` with these two, and a line in
its table that says what it cannot do. Shapes as in model_components.py.
"""

import functools
import typing

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model_components import ResidualProjection, build_norm, component, softcap

# ---------------------------------------------------------------- what is in sight


class AttentionMaskSpec(typing.NamedTuple):
    """What the queries of one forward pass see, in the layers of one kind.

    queries (T,) and keys (S,): positions, int64, the last T keys being the queries' own; window: as
    `ModelConfig.window`; documents (B, T) int64: the number of each token's document, where they are kept apart;
    slopes (H,) float32: ALiBi's.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    window: int | None
    causal: bool
    documents: torch.Tensor | None
    alibi_slopes: torch.Tensor | None

    def is_visible(self, distance):
        """bool, the shape of `distance` = query's position - key's: whether the query sees so far, and back."""
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (distance < self.window) & (distance > -self.window)
        return seen

    def is_causal_only(self):
        """Whether the causal triangle is all there is to it, which every kernel knows without a mask."""
        T, S = len(self.queries), len(self.keys)
        return self.causal and T == S and self.documents is None and (self.window is None or self.window >= S)

    def is_full(self):
        """Whether every query sees every key: a token at a time, or no mask at all."""
        T, S = len(self.queries), len(self.keys)
        return self.documents is None and (self.window is None or self.window >= S) and (T == 1 or not self.causal)

    def bool_mask(self):
        """(T, S) or (B, 1, T, S) bool, True where a query sees a key; None if that is everywhere."""
        if self.is_full():
            return None
        seen = self.is_visible(self.queries[:, None] - self.keys[None, :])  # (T, S)
        if self.documents is not None:
            same = self.documents[:, :, None] == self.documents[:, None, :]  # (B, T, T)
            seen = (seen & same)[:, None]
        return seen

    def bias(self):
        """(H, T, S) float32 to be added to the scores; None: nothing."""
        if self.alibi_slopes is None:
            return None
        distance = (self.queries[:, None] - self.keys[None, :]).abs()
        return -self.alibi_slopes[:, None, None] * distance


# ---------------------------------------------------------------- the backends


class ManualAttention(nn.Module):
    """Self-attention written out, to be read and to be tested against; the base of the other backends.

    n_kv_head < n_head shares each key/value head among n_head / n_kv_head query heads (Ainslie 2023).
    window: tokens that this layer sees (`ModelConfig.window`). Windows are masked here, not skipped.
    """

    tp_plan = {"q_proj": "columns", "k_proj": "columns", "v_proj": "columns", "o_proj": "rows",
                   "qk_norm": "shards", "value_mix": "shards"}

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.block_size, self.dropout, self.causal = config.block_size, config.dropout, config.causal
        self.window, self.softcap = config.window(layer), config.attn_softcap
        self.scale = config.attn_scale or component("init", config)(config).attention_scale()
        kv_dim = self.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_dim, bias=config.qkv_bias)
        self.qk_norm = component("qk_norm", config)(config)
        self.value_mix = None if config.value_table(layer) is None else ValueMix()
        self.gate = component("attn_gate", config)(config)
        self.o_proj = ResidualProjection(self.n_head * self.head_dim, config.n_embd, bias=config.bias)

    def forward(self, x, apply_rotary_emb, mask, cache=None, value_embedding=None):
        """x (B, T, C); rotate(q, k) -> q, k; mask: this class's `mask` of the layer's `AttentionMaskSpec`.

        cache: a `KVCache` to extend, when generating; value_embedding (B, T, G D), where the layer has a table.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # -1: all heads, or tensor parallelism's share of them
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = self.qk_norm(q, k)
        if value_embedding is not None:
            v = self.value_mix(v, value_embedding.view(v.shape))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, T, D) twice
        q, k = apply_rotary_emb(q, k)
        if cache is not None:
            k, v = cache.append(k, v, self.block_size)  # (B, G, S, D)
        y = self.attend(q, k, v, mask).transpose(1, 2)  # (B, T, H, D)
        return self.o_proj(self.gate(y, x).flatten(2))

    @staticmethod
    def mask(mask_spec):
        """(allowed, bias), see `AttentionMaskSpec`."""
        return mask_spec.bool_mask(), mask_spec.bias()

    def attend(self, q, k, v, mask):
        """q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D)."""
        bool_mask, bias = mask
        if self.n_kv_head != self.n_head:
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
        scores = softcap(q @ k.transpose(-2, -1) * self.scale, self.softcap)  # (B, H, T, S)
        if bias is not None:
            scores = scores + bias
        if bool_mask is not None:
            scores = scores.masked_fill(~bool_mask, float("-inf"))
        p = scores.softmax(dim=-1).to(v.dtype)
        return F.dropout(p, self.dropout, self.training) @ v

    def flops(self, seq_len):
        """As this backend computes them: the masked part of the scores too."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return {"attention projections": 2 * sum(p.weight.numel() for p in projections),
                "attention scores": self.score_flops(self.computed_keys(seq_len))}

    def score_flops(self, keys):
        """Of q k^T and p v, for a query that meets `keys` keys."""
        return 4 * keys * self.n_head * self.head_dim

    def computed_keys(self, seq_len):
        """Keys that this backend computes for each query."""
        return seq_len

    def needed_keys(self, seq_len, convention):
        """Keys for each query by a convention: PaLM counts all in the layer's span, causal those not masked.

        The causal mean leaves out the half key of the diagonal, as the convention that halves the scores does.
        """
        span = min(seq_len, self.window or seq_len)
        if not self.causal:
            return min(seq_len, 2 * span - 1) if self.window else seq_len
        return span if convention == "PaLM" else span - span * span / (2 * seq_len)


class SDPAttention(ManualAttention):
    """The product left to torch's fused kernels, of which torch chooses one: see `kernel`. Takes no softcap."""

    @staticmethod
    def mask(mask_spec):
        """(attn_mask or None, is_causal) of scaled_dot_product_attention."""
        bias = mask_spec.bias()
        if mask_spec.is_causal_only() and bias is None:
            return None, True
        bool_mask = mask_spec.bool_mask()
        if bias is None:
            return bool_mask, False
        bias = bias[None]  # (1, H, T, S): the fused kernels take masks of two or four dimensions, not of three
        return bias if bool_mask is None else bias.masked_fill(~bool_mask, float("-inf")), False

    def attend(self, q, k, v, mask):
        return self.product(F.scaled_dot_product_attention, q, k, v, mask)

    def product(self, function, q, k, v, mask):
        attn_mask, is_causal = mask
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(q.dtype)
        return function(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale,
                        dropout_p=self.dropout if self.training else 0.0, enable_gqa=self.n_kv_head != self.n_head)

    def kernel(self, mask_spec, dtype):
        """The name of the kernel that torch chooses to train on a sequence like `mask_spec`, in `dtype`, on its device."""
        like = dict(dtype=dtype, device=mask_spec.queries.device, requires_grad=True)  # the choice may depend on gradients
        q, k = (torch.empty(1, n, len(mask_spec.queries), self.head_dim, **like) for n in (self.n_head, self.n_kv_head))
        return SDPBackend(self.product(torch._fused_sdp_choice, q, k, k, self.mask(mask_spec))).name.lower()


class FlexAttention(ManualAttention):
    """torch's flex_attention (Dong et al. 2024): blocks out of sight are skipped. Takes no dropout; trains on CUDA."""

    BLOCK = 128  # flex_attention's own default

    @staticmethod
    def mask(mask_spec):
        """(BlockMask or None, slopes)."""
        if mask_spec.is_full():
            return None, (mask_spec.queries, mask_spec.keys, mask_spec.alibi_slopes)

        def mask_mod(b, h, i, j):
            seen = mask_spec.is_visible(mask_spec.queries[i] - mask_spec.keys[j])
            return seen if mask_spec.documents is None else seen & (mask_spec.documents[b, i] == mask_spec.documents[b, j])

        B = None if mask_spec.documents is None else mask_spec.documents.shape[0]
        make = compile_once(create_block_mask) if mask_spec.queries.is_cuda else create_block_mask
        block_mask = make(mask_mod, B, None, len(mask_spec.queries), len(mask_spec.keys), device=mask_spec.queries.device)
        return block_mask, (mask_spec.queries, mask_spec.keys, mask_spec.alibi_slopes)

    def attend(self, q, k, v, mask):
        block_mask, (queries, keys, alibi_slopes) = mask

        def score_mod(score, b, h, i, j):
            score = softcap(score, self.softcap)
            return score if alibi_slopes is None else score - alibi_slopes[h] * (queries[i] - keys[j]).abs()

        changed = self.softcap is not None or alibi_slopes is not None
        kernel = compile_once(flex_attention) if q.is_cuda else flex_attention
        return kernel(q, k, v, score_mod=score_mod if changed else None, block_mask=block_mask, scale=self.scale,
                      enable_gqa=self.n_kv_head != self.n_head)

    def computed_keys(self, seq_len):
        """Whole blocks: of every block of queries, the blocks of keys that any of them sees."""
        blocks = -(-seq_len // self.BLOCK)
        back = blocks if self.window is None else -(-(self.window - 1) // self.BLOCK)
        met = sum(min(i, back) + (1 if self.causal else 1 + min(blocks - 1 - i, back)) for i in range(blocks))
        return min(seq_len, met * self.BLOCK / blocks)


@functools.cache
def compile_once(function):
    """torch.compile(function), once; inside a compiled model torch sees through it."""
    return torch.compile(function)


# ---------------------------------------------------------------- what stands around the product


class NoQKNorm(nn.Module):
    """Queries (B, T, H, D) and keys (B, T, G, D) as they are. across_heads: whether one head's depend on another's."""

    across_heads = False

    def __init__(self, config):
        super().__init__()

    def forward(self, q, k):
        return q, k


class QKNormPerHead(NoQKNorm):
    """Each head normalised over its D channels, with one gain for all heads. Henry et al. 2020; Qwen3, Gemma 3."""

    def __init__(self, config):
        super().__init__(config)
        self.q_norm = build_norm(config, config.head_dim)
        self.k_norm = build_norm(config, config.head_dim)

    def forward(self, q, k):
        return self.q_norm(q), self.k_norm(k)


class QKNormProjection(NoQKNorm):
    """All heads normalised as one vector of H D channels. OLMo 2."""

    across_heads = True

    def __init__(self, config):
        super().__init__(config)
        self.q_norm = build_norm(config, config.n_head * config.head_dim)
        self.k_norm = build_norm(config, config.n_kv_head * config.head_dim)

    def forward(self, q, k):
        return self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)


class NoGate(nn.Module):
    """What attention gathered, y (B, T, H, D), as it is; x (B, T, C) is what attention read."""

    def __init__(self, config):
        super().__init__()

    def forward(self, y, x):
        return y


class ElementwiseGate(NoGate):
    """y * sigmoid(W x), a gate for every channel of every head. Qiu et al. 2025."""

    tp_plan = {"gate_proj": "columns"}

    def __init__(self, config):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)

    def forward(self, y, x):
        return y * self.gate_proj(x).sigmoid().view(y.shape)

    def flops(self, seq_len):
        return {"attention gate": 2 * self.gate_proj.weight.numel()}


class HeadwiseGate(ElementwiseGate):
    """y * sigmoid(W x), one gate a head. Qiu et al. 2025."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.n_embd, config.n_head, bias=config.bias)

    def forward(self, y, x):
        return y * self.gate_proj(x).sigmoid().unsqueeze(-1)  # (B, T, H, 1)


class ValueMix(nn.Module):
    """own * v + other * e: a layer's values and the tokens' value embeddings, both (B, T, G, D). modded-nanogpt."""

    init_constants = {"own": 0.5, "other": 0.5}

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.empty(1))
        self.other = nn.Parameter(torch.empty(1))

    def forward(self, v, e):
        return self.own.to(v.dtype) * v + self.other.to(v.dtype) * e.to(v.dtype)


# ---------------------------------------------------------------- generation


class KVCache:
    """Keys and values of the tokens so far, for one layer: (B, G, S, D) each.

    Without a window, filled from the left of a buffer of max_len; with one, only the window - 1 that the next
    token still sees are kept. length: tokens seen so far.
    """

    def __init__(self, window=None):
        self.window = window
        self.k = self.v = None
        self.length = 0

    def append(self, k, v, max_len):
        """Store k, v (B, G, T, D) behind what is there; return the keys and values that these T tokens may see."""
        end = self.length + k.shape[2]
        if self.window is not None:
            k, v = (t if kept is None else torch.cat((kept, t), dim=2) for kept, t in ((self.k, k), (self.v, v)))
            first = max(0, k.shape[2] - (self.window - 1))
            self.k, self.v = k[:, :, first:], v[:, :, first:]
            if first > self.window:  # a view would hold on to all of a long prompt
                self.k, self.v = self.k.clone(), self.v.clone()
        else:
            if self.k is None:
                self.k = k.new_empty(*k.shape[:2], max_len, k.shape[3])
                self.v = torch.empty_like(self.k)
            self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
            k, v = self.k[:, :, :end], self.v[:, :, :end]
        self.length = end
        return k, v
