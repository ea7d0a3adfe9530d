"""From a `ModelConfig` to a model: the block, the stack, initialisation, generation.

Components are looked up in the axis tables; nothing here asks which one it got.
"""

import dataclasses
import hashlib
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError
from model_components import KVCache, ResidualProjection, component
from model_config import AXES


class Block(nn.Module):
    """Attention, then FFN, each joined to the residual stream as `norm_position` has it."""

    def __init__(self, config):
        super().__init__()
        residual = component("norm_position", config)
        self.attn_residual = residual(config)
        self.attn = component("attention_backend", config)(config)
        self.ffn_residual = residual(config)
        self.ffn = component("ffn_type", config)(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotate, cache=None):
        x = self.attn_residual(x, lambda h: self.dropout(self.attn(h, rotate, cache)))
        return self.ffn_residual(x, lambda h: self.dropout(self.ffn(h)))


class GPT(nn.Module):
    """A decoder-only transformer. Built by `build_model`, which also gives it its weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = component("position_encoding", config)(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        wants_norm = component("norm_position", config).final_norm
        self.final_norm = component("normalization", config)(config) if wants_norm else nn.Identity()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.weight_tying:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx, targets=None, caches=None):
        """Logits for every position, and the loss where there are targets.

        idx, targets: (B, T) int64; a target of -1 is ignored. caches: one `KVCache` a layer, when generating.
        Returns logits (B, T, vocab_size) and the mean cross-entropy in nats per target (None without targets).
        """
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)  # (T,)
        x = self.dropout(self.position.embed(self.token_embedding(idx), positions))  # (B, T, C)
        rotate = partial(self.position.rotate, tables=self.position.tables(positions))
        for i, block in enumerate(self.blocks):
            x = block(x, rotate, caches[i] if caches else None)
        logits = self.lm_head(self.final_norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

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
        caches = [KVCache() for _ in self.blocks] if use_cache else None
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

    def built(self):
        """What stands here, read from the modules and the tensors themselves and not from the config.

        Returns a `ModelConfig` whose axes, sizes, bias and tying are those of the built model.
        """
        classes = {type(m).__name__ for m in self.modules()}
        chosen = {a: name for a, table in AXES.items() for name, o in table.items() if o.cls in classes}
        attn, ffn = self.blocks[0].attn, self.blocks[0].ffn
        return dataclasses.replace(
            self.config, **chosen,
            n_layer=len(self.blocks), n_embd=self.token_embedding.weight.shape[1],
            vocab_size=self.lm_head.weight.shape[0], d_ff=ffn.down_proj.in_features,
            n_head=attn.q_proj.out_features // attn.head_dim, n_kv_head=attn.k_proj.out_features // attn.head_dim,
            bias=attn.o_proj.bias is not None, weight_tying=self.lm_head.weight is self.token_embedding.weight)

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


def build_model(config, seed=1337, device=None):
    """The model that `config` describes, with its initial weights on `device`.

    config: a `ModelConfig`. Under `torch.device('meta')` the model has shapes and no weights.
    The weights are a function of (seed, parameter name) alone: see `init_weights`.
    """
    with torch.device("meta"):
        model = GPT(config.resolve())
    if torch.get_default_device().type == "meta":
        return model
    model.to_empty(device=device or torch.get_default_device())
    if config.weight_tying:  # to_empty parts what was tied
        model.lm_head.weight = model.token_embedding.weight
    init_weights(model, seed)
    return model


@torch.no_grad()
def init_weights(model, seed):
    """GPT-2's initialisation: N(0, init_std), residual projections N(0, init_std / sqrt(2 n_layer)), biases 0, norms 1.

    Each parameter is drawn on the CPU from a generator seeded by (seed, its name), so two architectures start
    the parameters they share equal, on every device and however the model is distributed.
    """
    std, scale = model.config.init_std, (2 * model.config.n_layer) ** -0.5
    owner = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    for name, p in model.named_parameters():  # tied weights once, under the embedding's name
        if p.dim() >= 2:
            residual = isinstance(owner[id(p)], ResidualProjection)
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            p.copy_(torch.empty(p.shape).normal_(0.0, std * scale if residual else std, generator=generator))
        elif name.endswith(".bias"):
            p.zero_()
        else:
            p.fill_(1.0)


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
