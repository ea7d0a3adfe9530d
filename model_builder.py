"""From a `ModelConfig` to a model: the block, the stack, initialisation, generation.

Components are looked up in the axis tables; nothing here asks which one it got.
"""

import dataclasses
import hashlib
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from blockgpt.errors import UserError
from model_attention import AttentionMaskSpec, KVCache
from model_components import OutputHead, X0Mix, build_norm, component
from model_config import AXES
from model_init import init_role


class Block(nn.Module):
    """Attention, then FFN, each joined to the residual stream as `norm_position` has it."""

    def __init__(self, config, layer):
        super().__init__()
        residual = component("norm_position", config)
        self.value_table = config.value_table(layer)
        self.x0_mix = X0Mix() if config.x0_mix else None
        self.attn_residual = residual(config)
        self.attn = component("attention_backend", config)(config, layer)
        self.ffn_residual = residual(config)
        self.ffn = component("ffn_type", config)(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, x0, apply_rotary_emb, mask, cache=None, value_embedding=None):
        """x, x0 (B, T, C): the residual stream and, for x0_mix, how it began; the rest: see the attention's forward."""
        if self.x0_mix is not None:
            x = self.x0_mix(x, x0)
        return self.combine(x, lambda h: self.dropout(self.attn(h, apply_rotary_emb, mask, cache, value_embedding)),
                            lambda h: self.dropout(self.ffn(h)))

    def combine(self, x, attn, ffn):
        """x (B, T, C) with both sublayers joined to it."""
        return self.ffn_residual(self.attn_residual(x, attn), ffn)


class ParallelBlock(Block):
    """Attention and FFN side by side, a norm each. GPT-NeoX (Black et al. 2022)."""

    def combine(self, x, attn, ffn):
        return self.attn_residual.join(x, self.attn_residual.branch(x, attn) + self.ffn_residual.branch(x, ffn))


class ParallelBlockOneNorm(Block):
    """Attention and FFN side by side, on the same norm. GPT-J (Wang & Komatsuzaki 2021)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.ffn_residual = None

    def combine(self, x, attn, ffn):
        return self.attn_residual(x, lambda h: attn(h) + ffn(h))


class GPT(nn.Module):
    """A transformer. Built by `build_model`, which also gives it its weights."""

    tp_plan = {"token_embedding": "vocabulary", "value_embeddings.*": "columns", "lm_head": "logits"}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.init = component("init", config)(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.embedding_scale = config.n_embd**0.5 if config.embedding_scale == "sqrt" else config.embedding_scale
        self.position = component("position_encoding", config)(config)
        self.embedding_norm = build_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.value_embeddings = nn.ModuleList(nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
                                              for _ in range(config.value_embeddings))
        self.blocks = nn.ModuleList(component("parallel_block", config)(config, i) for i in range(config.n_layer))
        self.windows = tuple(dict.fromkeys(block.attn.window for block in self.blocks))  # the kinds of layers
        wants_norm = component("norm_position", config).final_norm
        self.final_norm = build_norm(config) if wants_norm else nn.Identity()
        self.lm_head = OutputHead(config, self.init.logit_scale)
        if config.weight_tying:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx, targets=None, caches=None, documents=None):
        """Logits for every position, and the loss where there are targets.

        idx, targets: (B, T) int64; a target of -1 is ignored. caches: one `KVCache` a layer, when generating.
        documents: (B, T) int64, the number of each token's document, which mask_documents keeps apart; without it, or
        without that key, a sequence is one document.
        Returns logits (B, T, vocab_size) and the mean cross-entropy in nats per target (None without targets).
        """
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)  # (T,)
        x = self.token_embedding(idx)  # (B, T, C)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        x = self.dropout(self.embedding_norm(self.position.embed(x, positions)))
        x0 = x if self.config.x0_mix else None
        values = [table(idx) for table in self.value_embeddings]  # (B, T, G D) each
        views = {window: self.view(window, positions, start, documents) for window in self.windows}
        for i, block in enumerate(self.blocks):
            value = None if block.value_table is None else values[block.value_table]
            x = block(x, x0, *views[block.attn.window], caches[i] if caches else None, value)
        logits = self.lm_head(self.final_norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def view(self, window, positions, start, documents=None):
        """(rotate, mask) for the layers with this window; `positions` (T,) follow `start` tokens in a cache."""
        apply_rotary_emb = partial(self.position.apply_rotary_emb, cos_sin=self.position.cos_sin(positions, window))
        return apply_rotary_emb, self.blocks[0].attn.mask(self.mask_spec(window, positions, start, documents))

    def mask_spec(self, window, positions, start=0, documents=None):
        """The `AttentionMaskSpec` of the layers with this window; a cache holds as many tokens as the next one sees."""
        cached = start if window is None else min(start, window - 1)
        keys = torch.arange(start - cached, start + len(positions), device=positions.device) if cached else positions
        return AttentionMaskSpec(positions, keys, window, self.config.causal, documents if self.config.mask_documents else None,
                     self.position.alibi_slopes(positions.device))

    def attention_kernels(self, dtype):
        """{"full" or the window: torch's choice of kernel for it at block_size}, where the backend leaves one."""
        positions = torch.arange(self.config.block_size, device=self.lm_head.weight.device)
        documents = torch.zeros_like(positions)[None]  # (1, T)
        attn = self.blocks[0].attn
        return {str(w or "full"): attn.kernel(self.mask_spec(w, positions, documents=documents), dtype)
                for w in self.windows if hasattr(attn, "kernel")}

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, stop=None,
                 generator=None, use_cache=True):
        """Append up to max_new_tokens sampled tokens to idx (B, T) and return the whole.

        temperature 0 takes the likeliest token; top_k and top_p (Holtzman 2020) cut the tail; vocab_size bars
        the padded rows above it; stop ends a batch of one at that token. Past block_size the context slides,
        one full forward pass a token, as every position in it changes.
        """
        was_training = self.training
        self.eval()
        block_size = self.config.block_size
        if not self.config.causal:
            raise UserError("causal=False: a model whose tokens see later ones cannot write one after the other")
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

    def infer_config(self):
        """What stands here, read from the modules and the tensors themselves and not from the config.

        Returns a `ModelConfig` whose axes, sizes, bias and tying are those of the built model.
        """
        classes = {type(m).__name__ for m in (*self.modules(), self.init)}
        chosen = {a: name for a, table in AXES.items() for name, o in table.items() if o.cls in classes}
        attn, ffn = self.blocks[0].attn, self.blocks[0].ffn
        return dataclasses.replace(
            self.config, **chosen,
            n_layer=len(self.blocks), n_embd=self.token_embedding.weight.shape[1],
            vocab_size=self.lm_head.weight.shape[0], d_ff=ffn.down_proj.in_features,
            n_head=attn.q_proj.out_features // attn.head_dim, n_kv_head=attn.k_proj.out_features // attn.head_dim,
            qkv_bias=attn.q_proj.bias is not None, bias=attn.o_proj.bias is not None,
            weight_tying=self.lm_head.weight is self.token_embedding.weight,
            value_embeddings=len(self.value_embeddings), x0_mix=self.blocks[0].x0_mix is not None,
            embedding_norm=not isinstance(self.embedding_norm, nn.Identity))

    def lr_multipliers(self):
        """{parameter name: what its learning rate is multiplied by}, as `init` has it; vectors: 1."""
        return {name: self.init.lr_multiplier(init_role(module)) if p.dim() >= 2 else 1.0
                for name, p, module in named_parameters_with_module(self)}

    def parameter_counts(self):
        """{total, trainable, non_embedding}; tied weights count once, non_embedding leaves out tokens and positions."""
        embeddings = {id(m.weight): m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding)}
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, "trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
                "non_embedding": total - sum(embeddings.values())}


def sample_token(logits, temperature, top_k, top_p, vocab_size, generator):
    """One token per row of logits (B, V), as (B, 1); the arguments are `GPT.generate`'s."""
    if vocab_size is not None:
        logits[:, vocab_size:] = float("-inf")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(dim=-1)
        tail = p.cumsum(dim=-1) - p >= top_p  # the token that crosses top_p stays
        logits = logits.masked_fill(tail.scatter(1, order, tail), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def build_model(config, seed=1337, device=None, parallelize=None):
    """The model that `config` describes, with its initial weights on `device`.

    config: a `ModelConfig`. Under `torch.device('meta')` the model has shapes and no weights.
    distribute: called with the model before it has storage, to part it among processes; none ever holds it whole.
    The weights are a function of (seed, parameter name) alone: see `init_weights`.
    """
    with torch.device("meta"):
        model = GPT(config.resolve())
    if torch.get_default_device().type == "meta":
        return model
    if parallelize:
        parallelize(model)
    model.to_empty(device=device or torch.get_default_device())
    if config.weight_tying:  # to_empty parts what was tied
        model.lm_head.weight = model.token_embedding.weight
    init_weights(model, seed)
    return model


@torch.no_grad()
def init_weights(model, seed):
    """Give every parameter its initial value, by `model.init` and the modules' own `start`.

    Each matrix is drawn on the CPU from a generator seeded by (seed, its name), so two architectures start
    the parameters they share equal, on every device and however the model is distributed.
    """
    for name, p, module in named_parameters_with_module(model):
        attribute = name.rpartition(".")[2]
        constant = getattr(module, "init_constants", {}).get(attribute)
        if constant is None and p.dim() >= 2:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            whole = torch.empty(p.shape).normal_(0.0, model.init.init_std(init_role(module)), generator=generator)
            p.copy_(whole if type(p) is nn.Parameter else local_shard_of(p, whole))
        else:
            p.fill_((0.0 if attribute == "bias" else 1.0) if constant is None else constant)


def local_shard_of(p, whole):
    """Of `whole`, which every process has, what it keeps where p is a DTensor; no process hears of another."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def named_parameters_with_module(model):
    """(name, parameter, the module that holds it) of each; tied weights once, as the embedding's."""
    seen = set()
    for prefix, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                yield f"{prefix}.{attribute}" if prefix else attribute, p, module


def load_weights(model, tensors, source):
    """Copy `tensors` {name: tensor} into the model; `UserError` naming `source` unless names and shapes all match."""
    own = dict(model.named_parameters())
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise UserError(f"{source}: is not of this architecture (missing {missing[:3]}, unexpected {extra[:3]})")
    with torch.no_grad():
        for name, p in own.items():
            if p.shape != tensors[name].shape:
                raise UserError(f"{source}: {name} is {tuple(tensors[name].shape)}, this model has {tuple(p.shape)}")
            p.copy_(tensors[name])
