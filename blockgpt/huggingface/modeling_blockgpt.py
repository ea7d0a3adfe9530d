"""A model of blockGPT for transformers: every architecture that its axes describe, in one file that needs nothing else.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The configuration's keys are those of blockGPT, with every derived value filled in. Attention goes through transformers'
attention interface (eager, sdpa, flash, flex); ALiBi and a softcap of the scores need the eager one.
Shapes: B batch, T time, S keys, C channels, H heads, G key/value heads, D width of a head.
"""

# mypy: ignore-errors
import dataclasses
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# transformers 5.24 renamed the argument past_key_values.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


class BlockGPTConfig(PretrainedConfig):
    """The keys of blockGPT, and the names that transformers expects of some of them."""

    model_type = "blockgpt"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "num_key_value_heads": "n_kv_head", "intermediate_size": "d_ff",
                     "max_position_embeddings": "block_size"}

    def __init__(self, normalization="rmsnorm", norm_eps=1e-5, norm_position="pre", parallel_block="none",
                 activation="silu", ffn_type="swiglu", d_ff=1024, position_encoding="rope", rope_theta=10000.0,
                 rope_theta_local=None, rope_fraction=1.0, rope_scaling_type="none", rope_scaling_factor=8.0,
                 rope_original_context=None, rope_pattern="R", qk_norm="none", attn_gate="none", attn_scale=None,
                 attn_softcap=None, logit_softcap=None, logit_scale=1.0, sliding_window=None, window_pattern="L",
                 bias=False, qkv_bias=False, head_bias=False, embedding_scale=1.0, embedding_norm=False,
                 residual_scale=1.0, x0_mix=False, value_embeddings=0, dropout=0.0, n_layer=4, n_head=4, n_kv_head=4,
                 n_embd=256, head_dim=64, block_size=256, vocab_size=50304, use_cache=True, **kwargs):
        given = dict(locals())
        for name in inspect.signature(BlockGPTConfig.__init__).parameters:
            if name not in ("self", "kwargs"):
                setattr(self, name, given[name])
        letters = (window_pattern * n_layer)[:n_layer]
        self.layer_types = ["sliding_attention" if letter == "S" else "full_attention" for letter in letters]
        super().__init__(**kwargs)


class BlockGPTNorm(nn.Module):
    """The norm that `normalization` names, over the last dimension."""

    def __init__(self, config, dim):
        super().__init__()
        self.form, self.eps, self.shape = config.normalization, config.norm_eps, (dim,)
        self.weight = nn.Parameter(torch.ones(dim))
        if self.form in ("layernorm", "dyt"):
            self.bias = nn.Parameter(torch.zeros(dim))
        if self.form == "dyt":
            self.alpha = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x):
        if self.form == "dyt":
            return torch.tanh(self.alpha * x) * self.weight + self.bias
        if self.form == "rmsnorm":
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        if self.form == "rmsnorm_gemma":
            return F.rms_norm(x, self.shape, 1.0 + self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, getattr(self, "bias", None), self.eps)


class BlockGPTQKNorm(nn.Module):
    """Queries (B, T, H, D) and keys (B, T, G, D) normalised: each head, or all heads as one vector."""

    def __init__(self, config):
        super().__init__()
        self.per_head = config.qk_norm == "head"
        width = config.head_dim
        self.q_norm = BlockGPTNorm(config, width if self.per_head else width * config.n_head)
        self.k_norm = BlockGPTNorm(config, width if self.per_head else width * config.n_kv_head)

    def forward(self, q, k):
        if self.per_head:
            return self.q_norm(q), self.k_norm(k)
        return self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)


class BlockGPTGate(nn.Module):
    """The output of attention (B, T, H, D) times sigmoid(W x): a value per channel, or per head."""

    def __init__(self, config):
        super().__init__()
        width = config.n_head * (config.head_dim if config.attn_gate == "elementwise" else 1)
        self.gate_proj = nn.Linear(config.n_embd, width, bias=config.bias)

    def forward(self, y, x):
        return y * self.gate_proj(x).sigmoid().view(*y.shape[:3], -1)


class BlockGPTValueMix(nn.Module):
    """own * v + other * e, with a table of token embeddings e."""

    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Parameter(torch.full((1,), 0.5)), nn.Parameter(torch.full((1,), 0.5))

    def forward(self, v, e):
        return self.own * v + self.other * e


class BlockGPTX0Mix(nn.Module):
    """stream * x + first * x0, with the embeddings x0."""

    def __init__(self):
        super().__init__()
        self.stream, self.first = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, x0):
        return self.stream * x + self.first * x0


def rotate_pairs(x, cos, sin):
    """x (B, H, T, D), its pairs (x_i, x_{i + R/2}) rotated by cos and sin (B, 1, T, R/2); the rest is unchanged."""
    a, b = x[..., :2 * cos.shape[-1]].chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * cos.shape[-1]:]), dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs):
    """The attention product written out: (B, T, H, D) and the weights (B, H, T, S)."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., :key.shape[2]]
    weights = F.dropout(scores.softmax(-1).to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class BlockGPTAttention(nn.Module):
    """Multi-head or grouped-query attention of one layer, with its window."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer, True
        self.head_dim, self.scaling = config.head_dim, config.attn_scale or config.head_dim**-0.5
        self.num_key_value_groups = config.n_head // config.n_kv_head
        self.sliding_window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        self.rotates = config.rope_pattern[layer % len(config.rope_pattern)] == "R"
        self.q_proj = nn.Linear(config.n_embd, config.n_head * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.qk_norm = None if config.qk_norm == "none" else BlockGPTQKNorm(config)
        self.gate = None if config.attn_gate == "none" else BlockGPTGate(config)
        from_the_end = config.n_layer - 1 - layer
        self.value_table = next((i for i in (layer, from_the_end) if i < config.value_embeddings), None)
        self.value_mix = None if self.value_table is None else BlockGPTValueMix()

    def forward(self, x, cos_sin, attention_mask, alibi_slopes, tables, cache, **kwargs):
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        if self.value_mix is not None:
            v = self.value_mix(v, tables[self.value_table].view(v.shape))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cos_sin is not None and self.rotates:
            q, k = rotate_pairs(q, *cos_sin), rotate_pairs(k, *cos_sin)
        own = v
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if self.sliding_window == 1:  # each token sees itself; transformers' cache cannot store no token at all
            y = own.repeat_interleave(self.num_key_value_groups, dim=1).transpose(1, 2)
            return self.project(y, x), None
        if alibi_slopes is not None:  # the last key is that of the last query
            T, S = q.shape[2], k.shape[2]
            distance = torch.arange(S - T, S, device=x.device)[:, None] - torch.arange(S, device=x.device)
            attention_mask = attention_mask - (alibi_slopes[:, None, None] * distance.abs()).to(x.dtype)
        attend = eager_attention
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=self.sliding_window,
                            dropout=self.config.dropout if self.training else 0.0, softcap=self.config.attn_softcap,
                            **kwargs)
        return self.project(y.reshape(*x.shape[:2], -1, self.head_dim), x), weights

    def project(self, y, x):
        """The output of the attention product, (B, T, H, D), gated and projected to (B, T, C)."""
        return self.o_proj((y if self.gate is None else self.gate(y, x)).flatten(2))


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": F.relu,
               "relu2": lambda x: F.relu(x).square(), "leaky_relu": F.leaky_relu}


class BlockGPTFFN(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        if config.ffn_type != "standard":
            self.gate_proj = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.up_proj = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)

    def forward(self, x):
        up = self.up_proj(x)
        gated = self.activation(self.gate_proj(x)) * up if hasattr(self, "gate_proj") else self.activation(up)
        return self.down_proj(gated)


class BlockGPTResidual(nn.Module):
    """How a sublayer is joined to the residual stream: pre, post, sandwich or reordered."""

    def __init__(self, config):
        super().__init__()
        self.position, self.scale = config.norm_position, config.residual_scale
        self.norm = BlockGPTNorm(config, config.n_embd)
        if self.position == "sandwich":
            self.norm_after = BlockGPTNorm(config, config.n_embd)

    def branch(self, x, sublayer):
        """What the sublayer adds."""
        y = sublayer(self.norm(x) if self.position in ("pre", "sandwich") else x)
        if self.position == "sandwich":
            return self.norm_after(y)
        return self.norm(y) if self.position == "reordered" else y

    def join(self, x, y):
        x = x + y * self.scale
        return self.norm(x) if self.position == "post" else x


class BlockGPTBlock(GradientCheckpointingLayer):
    """Attention and FFN, in sequence or in parallel."""

    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel_block
        self.x0_mix = BlockGPTX0Mix() if config.x0_mix else None
        self.attn_residual = BlockGPTResidual(config)
        self.attn = BlockGPTAttention(config, layer)
        if self.parallel != "one_norm":
            self.ffn_residual = BlockGPTResidual(config)
        self.ffn = BlockGPTFFN(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, x0, *arguments, **kwargs):
        if self.x0_mix is not None:
            x = self.x0_mix(x, x0)

        def attn(h):
            return self.dropout(self.attn(h, *arguments, **kwargs)[0])

        def ffn(h):
            return self.dropout(self.ffn(h))

        if self.parallel == "one_norm":
            return self.attn_residual.join(x, self.attn_residual.branch(x, lambda h: attn(h) + ffn(h)))
        if self.parallel == "two_norms":
            return self.attn_residual.join(x, self.attn_residual.branch(x, attn) + self.ffn_residual.branch(x, ffn))
        x = self.attn_residual.join(x, self.attn_residual.branch(x, attn))
        return self.ffn_residual.join(x, self.ffn_residual.branch(x, ffn))


class BlockGPTPositions(nn.Module):
    """Position encodings: on the embeddings, on queries and keys, or on the scores."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.position_encoding == "learned_absolute":
            self.embedding = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x, positions):
        """x (B, T, C), the embeddings; positions (B, T)."""
        if self.config.position_encoding == "learned_absolute":
            return x + self.embedding(positions)
        if self.config.position_encoding == "sinusoidal":
            C = x.shape[-1]
            pair = torch.arange(0, C, 2, device=x.device, dtype=torch.float32)
            angles = positions[..., None].float() * 10000.0 ** (-pair / C)
            return x + torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :C].to(x.dtype)
        return x

    def cos_sin(self, positions, has_window, dtype):
        """The rotation, (B, 1, T, R/2) each; None without RoPE."""
        config = self.config
        if config.position_encoding != "rope":
            return None
        width = int(config.head_dim * config.rope_fraction)
        pair = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
        factor = 1.0
        if has_window and config.rope_theta_local is not None:
            frequencies = config.rope_theta_local ** (-pair / width)
        else:
            frequencies, factor = scale_frequencies(config.rope_theta ** (-pair / width), width, config)
        angles = (positions[..., None].float() * frequencies)[:, None]
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def alibi_slopes(self, device):
        """(H,); None without ALiBi."""
        if self.config.position_encoding != "alibi":
            return None
        heads = self.config.n_head
        n = 2 ** int(math.log2(heads))
        h = torch.arange(1, n + 1, device=device, dtype=torch.float32)
        between = 2 * torch.arange(heads - n, device=device, dtype=torch.float32) + 1
        return torch.cat((torch.exp2(-8 * h / n), torch.exp2(-4 * between / n)))


def scale_frequencies(frequencies, width, config):
    """(RoPE's frequencies (R/2,) for a longer context, factor on cos and sin)."""
    factor, context = config.rope_scaling_factor, config.rope_original_context
    if config.rope_scaling_type == "linear":
        return frequencies / factor, 1.0
    if config.rope_scaling_type == "llama3":
        turns = context * frequencies / (2 * math.pi)
        unscaled = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
        return frequencies * (unscaled + (1.0 - unscaled) / factor), 1.0
    if config.rope_scaling_type == "yarn":
        n = len(frequencies)

        def pair(turns):
            return n * math.log(context / (turns * 2 * math.pi)) / math.log(config.rope_theta)

        first, last = max(math.floor(pair(32.0)), 0), min(math.ceil(pair(1.0)), width - 1)
        index = torch.arange(n, device=frequencies.device, dtype=torch.float32)
        scaled = ((index - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
        return frequencies * (1.0 - scaled + scaled / factor), 0.1 * math.log(factor) + 1.0
    return frequencies, 1.0


class BlockGPTPreTrainedModel(PreTrainedModel):
    config_class = BlockGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BlockGPTBlock"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config, *arguments, **kwargs):
        if config.position_encoding == "alibi" or config.attn_softcap is not None:
            config._attn_implementation = "eager"
        super().__init__(config, *arguments, **kwargs)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class BlockGPTModel(BlockGPTPreTrainedModel):
    """The residual stream after the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = BlockGPTPositions(config)
        if config.embedding_norm:
            self.embedding_norm = BlockGPTNorm(config, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.value_embeddings = nn.ModuleList(nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
                                              for _ in range(config.value_embeddings))
        self.blocks = nn.ModuleList(BlockGPTBlock(config, i) for i in range(config.n_layer))
        if config.norm_position != "post":
            self.final_norm = BlockGPTNorm(config, config.n_embd)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.token_embedding

    def set_input_embeddings(self, value):
        self.token_embedding = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, use_cache=None,
                past_key_values=None, cache=None, cache_position=None, **kwargs):
        config = self.config
        cache = past_key_values if cache is None else cache
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if self.value_embeddings and input_ids is None:
            raise ValueError("inputs_embeds: value embeddings need input_ids")
        if cache is None and (config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache(config=config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        x = x * config.embedding_scale
        x = self.position.embed(x, position_ids)
        if config.embedding_norm:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        windows = set(config.layer_types)
        arguments = {"config": config, "inputs_embeds": x, "input_embeds": x, "attention_mask": attention_mask,
                     "past_key_values": cache, "cache": cache, "position_ids": position_ids,
                     "cache_position": position_ids[0]}
        arguments = {name: value for name, value in arguments.items() if name in MASK_ARGUMENTS}
        create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        masks = {window: create[window](**arguments) for window in windows}
        rotations = {window: self.position.cos_sin(position_ids, window == "sliding_attention", x.dtype)
                     for window in windows}
        alibi_slopes = self.position.alibi_slopes(x.device)
        tables = [table(input_ids) for table in self.value_embeddings]
        x0 = x
        for block, window in zip(self.blocks, config.layer_types, strict=True):
            x = block(x, x0, rotations[window], masks[window], alibi_slopes, tables, cache, **kwargs)
        if config.norm_position != "post":
            x = self.final_norm(x)
        return BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})


class BlockGPTForCausalLM(BlockGPTPreTrainedModel, GenerationMixin):
    """Logits: scale * W x + b, softcapped if a softcap is set."""

    _tied_weights_keys = {"lm_head.weight": "model.token_embedding.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = BlockGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.token_embedding

    def set_input_embeddings(self, value):
        self.model.token_embedding = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
                use_cache=None, logits_to_keep=0, past_key_values=None, cache=None, **kwargs):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                             inputs_embeds=inputs_embeds, use_cache=use_cache, past_key_values=past_key_values,
                             cache=cache, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep] * self.config.logit_scale)
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)})
