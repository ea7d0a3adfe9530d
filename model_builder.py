"""From a `ModelConfig` to a model: the block, the stack, initialisation, generation.

Components are looked up in the axis tables. Nothing here depends on which option was chosen.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from blockgpt.errors import UserError
from model_attention import ApplyRotaryEmb, AttentionMaskSpec, KVCache, ManualAttention
from model_components import OutputHead, PreNorm, StandardFFN, Sublayer, SwiGLU, X0Mix, build_norm, component
from model_config import AXES, ModelConfig
from model_init import NormalInit, init_role, init_weights, named_parameters_with_module
from model_positions import NoPositions


class Block(nn.Module):
    """Attention, then FFN, each joined to the residual stream as `norm_position` says."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        residual = component("norm_position", config)
        self.value_table = config.value_table(layer)
        self.x0_mix = X0Mix() if config.x0_mix else None
        self.attn_residual: PreNorm = residual(config)
        self.attn: ManualAttention = component("attention_backend", config)(config, layer)
        self.ffn_residual: PreNorm | None = residual(config)
        self.ffn: StandardFFN | SwiGLU = component("ffn_type", config)(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, x0: torch.Tensor | None, apply_rotary_emb: ApplyRotaryEmb, mask: Any,
                cache: KVCache | None = None, value_embedding: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, C), the residual stream, after this block.

        x0 (B, T, C): the embeddings, for x0_mix. The other arguments are those of `ManualAttention.forward`.
        """
        if self.x0_mix is not None:
            x = self.x0_mix(x, x0)
        return self.combine(x, lambda h: self.dropout(self.attn(h, apply_rotary_emb, mask, cache, value_embedding)),
                            lambda h: self.dropout(self.ffn(h)))

    def combine(self, x: torch.Tensor, attn: Sublayer, ffn: Sublayer) -> torch.Tensor:
        """x (B, T, C) with both sublayers joined to it."""
        assert self.ffn_residual is not None
        return self.ffn_residual(self.attn_residual(x, attn), ffn)


class ParallelBlock(Block):
    """Attention and FFN in parallel, each with its own norm. GPT-NeoX (Black et al. 2022)."""

    def combine(self, x: torch.Tensor, attn: Sublayer, ffn: Sublayer) -> torch.Tensor:
        assert self.ffn_residual is not None
        return self.attn_residual.join(x, self.attn_residual.branch(x, attn) + self.ffn_residual.branch(x, ffn))


class ParallelBlockOneNorm(Block):
    """Attention and FFN in parallel, on the same norm. GPT-J (Wang & Komatsuzaki 2021)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.ffn_residual = None

    def combine(self, x: torch.Tensor, attn: Sublayer, ffn: Sublayer) -> torch.Tensor:
        return self.attn_residual(x, lambda h: attn(h) + ffn(h))


class GPT(nn.Module):
    """A transformer. `build_model` builds it and initialises its weights."""

    tp_plan: ClassVar[dict[str, str]] = {"token_embedding": "embedding_rowwise", "value_embeddings.*": "colwise",
                                         "lm_head": "colwise_rep"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_kv_head is not None and config.head_dim is not None  # resolved
        self.config = config
        self.init: NormalInit = component("init", config)(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.embedding_scale = float(config.n_embd**0.5 if config.embedding_scale == "sqrt" else config.embedding_scale)
        self.position: NoPositions = component("position_encoding", config)(config)
        self.embedding_norm = build_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.value_embeddings = nn.ModuleList(nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
                                              for _ in range(config.value_embeddings))
        block: type[Block] = component("parallel_block", config)
        self.blocks = cast(Sequence[Block], nn.ModuleList(block(config, i) for i in range(config.n_layer)))
        self.windows = tuple(dict.fromkeys(b.attn.window for b in self.blocks))  # the different ones
        needs_norm = component("norm_position", config).final_norm
        self.final_norm = build_norm(config) if needs_norm else nn.Identity()
        self.lm_head = OutputHead(config, self.init.logit_scale)
        if config.weight_tying:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, caches: list[KVCache] | None = None,
                documents: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of every position, and the loss if there are targets.

        Args:
            idx: (B, T) int64, token ids.
            targets: (B, T) int64; -1 is ignored.
            caches: one `KVCache` per layer, when generating.
            documents: (B, T) int64, the id of each token's document. Read only with mask_documents; without it a
                sequence is one document.

        Returns:
            Logits (B, T, V) and the mean cross-entropy in nats per target, None without targets.
        """
        cached = caches[0].length if caches else 0
        positions = torch.arange(cached, cached + idx.shape[1], device=idx.device)  # (T,)
        x = self.token_embedding(idx)  # (B, T, C)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        x = self.dropout(self.embedding_norm(self.position.embed(x, positions)))
        x0 = x if self.config.x0_mix else None
        values = [table(idx) for table in self.value_embeddings]  # (B, T, G D) each
        by_window = {window: self.rotary_and_mask(window, positions, cached, documents) for window in self.windows}
        for i, block in enumerate(self.blocks):
            value = None if block.value_table is None else values[block.value_table]
            x = block(x, x0, *by_window[block.attn.window], caches[i] if caches else None, value)
        logits = self.lm_head(self.final_norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def rotary_and_mask(self, window: int | None, positions: torch.Tensor, cached: int = 0,
                        documents: torch.Tensor | None = None) -> tuple[ApplyRotaryEmb, Any]:
        """(apply_rotary_emb, mask) for the layers with `window`; positions (T,) follow `cached` tokens in a cache."""
        apply_rotary_emb = partial(self.position.apply_rotary_emb, cos_sin=self.position.cos_sin(positions, window))
        return apply_rotary_emb, self.blocks[0].attn.mask(self.mask_spec(window, positions, cached, documents))

    def mask_spec(self, window: int | None, positions: torch.Tensor, cached: int = 0,
                  documents: torch.Tensor | None = None) -> AttentionMaskSpec:
        """The `AttentionMaskSpec` of the layers with `window`; positions (T,) follow `cached` tokens in a cache."""
        in_window = cached if window is None else min(cached, window - 1)  # what a cache with this window has stored
        first = cached - in_window
        keys = torch.arange(first, cached + len(positions), device=positions.device) if in_window else positions
        return AttentionMaskSpec(positions, keys, window, self.config.causal,
                                 documents if self.config.mask_documents else None,
                                 self.position.alibi_slopes(positions.device))

    def attention_kernels(self, dtype: torch.dtype) -> dict[str, str]:
        """{"full" or the window: the kernel that torch chooses at block_size}; empty if the backend has only one."""
        positions = torch.arange(self.config.block_size, device=self.lm_head.weight.device)
        documents = torch.zeros_like(positions)[None]  # (1, T)
        attn = self.blocks[0].attn
        kernels = {str(w or "full"): attn.kernel(self.mask_spec(w, positions, documents=documents), dtype)
                   for w in self.windows}
        return {window: kernel for window, kernel in kernels.items() if kernel}

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, vocab_size: int | None = None, stop: int | None = None,
                 generator: torch.Generator | None = None, use_cache: bool = True) -> torch.Tensor:
        """Append up to max_new_tokens sampled tokens to idx (B, T). Returns prompt and new tokens, (B, T + new).

        Beyond block_size the context slides: one full forward pass per token, because every position changes.

        Args:
            idx: (B, T) int64, the prompt.
            max_new_tokens: tokens to append at most.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample from the k likeliest tokens.
            top_p: sample from the likeliest tokens that together have this probability (Holtzman 2020).
            vocab_size: ids from here on are never sampled (padded rows of the embedding).
            stop: end after this token; only for a batch of one.
            generator: source of randomness, on idx's device.
            use_cache: with a KV cache, or a full forward pass per token.

        Raises:
            UserError: the model is not causal.
        """
        was_training = self.training
        self.eval()
        block_size = self.config.block_size
        if not self.config.causal:
            raise UserError("causal=False: a model whose tokens see later ones cannot generate text")
        caches = [KVCache(block.attn.window) for block in self.blocks] if use_cache else None
        for _ in range(max_new_tokens):
            if caches and idx.shape[1] <= block_size:
                logits = self(idx[:, caches[0].length:], caches=caches)[0][:, -1]  # (B, V)
            else:
                caches = None
                logits = self(idx[:, -block_size:])[0][:, -1]
            token = sample_token(logits.float(), temperature, top_k, top_p, vocab_size, generator)  # (B, 1)
            idx = torch.cat((idx, token), dim=1)
            if stop is not None and idx.shape[0] == 1 and token.item() == stop:
                break
        self.train(was_training)
        return idx

    def infer_config(self) -> ModelConfig:
        """The config of this model as its modules and parameters show it; the rest is copied from `self.config`.

        Read back: the option of every axis, from the classes of the modules; n_layer, n_embd, vocab_size, d_ff, n_head
        and n_kv_head (for the configured head_dim), bias, qkv_bias, weight_tying, value_embeddings, x0_mix and
        embedding_norm, from the modules and the shapes of the parameters; norm_eps, dropout, residual_scale,
        attn_softcap and logit_softcap, from the attributes that the first block and the head compute with. A class that
        is in no table (FSDP replaces the class of every block) leaves its axis as configured.
        """
        classes = {type(module) for module in (*self.modules(), self.init)}
        chosen: dict[str, Any] = {axis: name for axis, table in AXES.items() for name, option in table.items()
                                  if option.load_class() in classes}
        block = self.blocks[0]
        attn, ffn = block.attn, block.ffn
        return dataclasses.replace(
            self.config, **chosen,
            n_layer=len(self.blocks), n_embd=self.token_embedding.weight.shape[1],
            vocab_size=self.lm_head.weight.shape[0], d_ff=ffn.down_proj.in_features,
            n_head=attn.q_proj.out_features // attn.head_dim, n_kv_head=attn.k_proj.out_features // attn.head_dim,
            qkv_bias=attn.q_proj.bias is not None, bias=attn.o_proj.bias is not None,
            weight_tying=self.lm_head.weight is self.token_embedding.weight,
            value_embeddings=len(self.value_embeddings), x0_mix=block.x0_mix is not None,
            embedding_norm=not isinstance(self.embedding_norm, nn.Identity),
            norm_eps=getattr(block.attn_residual.norm, "eps", self.config.norm_eps),  # DynamicTanh has none
            dropout=block.dropout.p, residual_scale=block.attn_residual.scale,
            attn_softcap=attn.softcap, logit_softcap=self.lm_head.softcap)

    def lr_multipliers(self) -> dict[str, float]:
        """{parameter name: factor on its learning rate}, as `init` says; 1 for vectors."""
        return {name: self.init.lr_multiplier(init_role(module), p.shape[-1]) if p.dim() >= 2 else 1.0
                for name, p, module in named_parameters_with_module(self)}

    def parameter_counts(self) -> dict[str, int]:
        """{total, trainable, non_embedding}. Tied weights count once; non_embedding omits every embedding table."""
        embeddings = {id(m.weight): m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding)}
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, "trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
                "non_embedding": total - sum(embeddings.values())}


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None,
                 vocab_size: int | None, generator: torch.Generator | None) -> torch.Tensor:
    """One token per row of logits (B, V), as (B, 1) int64. Arguments as in `GPT.generate`; overwrites logits."""
    if vocab_size is not None:
        logits[:, vocab_size:] = float("-inf")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        sorted_logits, order = logits.sort(descending=True)
        p = sorted_logits.softmax(dim=-1)
        tail = p.cumsum(dim=-1) - p >= top_p  # without the token that crosses top_p
        logits = logits.masked_fill(tail.scatter(1, order, tail), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def build_model(config: ModelConfig, seed: int = 1337, device: torch.device | str | None = None,
                parallelize: Callable[[GPT], None] | None = None) -> GPT:
    """The model that `config` describes, with its initial weights.

    Each weight is a function of (seed, parameter name, index) alone: see `init_weights`.

    Args:
        config: need not be resolved.
        seed: of the weights.
        device: of the weights; the default device if None. Under `torch.device("meta")` the model has shapes only.
        parallelize: called with the model on the meta device, to shard it over the ranks. Each rank then allocates
            only its shards, and `init_weights` generates only these.
    """
    with torch.device("meta"):
        model = GPT(config.resolve())
    if torch.get_default_device().type == "meta":
        return model
    if parallelize:
        parallelize(model)
    model.to_empty(device=device or torch.get_default_device())
    if config.weight_tying:  # to_empty unties
        model.lm_head.weight = model.token_embedding.weight
    init_weights(model, seed)
    return model


def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: object) -> None:
    """Copy `tensors` {parameter name: tensor} into the model.

    Raises:
        UserError: names or shapes differ from the model's; the message names `source`, where the tensors are from.
    """
    parameters = dict(model.named_parameters())
    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unexpected:
        raise UserError(f"{source}: is not of this architecture (missing {missing[:3]}, unexpected {unexpected[:3]})")
    with torch.no_grad():
        for name, p in parameters.items():
            if p.shape != tensors[name].shape:
                raise UserError(f"{source}: {name} is {tuple(tensors[name].shape)}, this model has {tuple(p.shape)}")
            p.copy_(tensors[name])
