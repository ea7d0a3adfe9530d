"""From a `ModelConfig` to a model: the block, the stack, initialisation, generation.

Components are looked up in the axis tables. Nothing here depends on which option was chosen.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from blockgpt.checkpoints.files import is_dtensor
from blockgpt.errors import UserError
from blockgpt.kernels.choose import used_kernels
from model_attention import Attention, AttentionMaskSpec, ForwardContext
from model_components import OutputHead, PreNorm, Sublayer, X0Mix, build_norm, component
from model_config import AXES, ModelConfig
from model_init import NormalInit, init_role, init_weights, named_parameters_with_module
from model_positions import NoPositions


class Block(nn.Module):
    """Attention, then FFN, each joined to the residual stream as `norm_position` says."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        residual = component("norm_position", config)
        self.x0_mix = X0Mix() if config.x0_mix else None
        self.attn_residual: PreNorm = residual(config)
        self.attn: Attention = component("attention_type", config)(config, layer)
        self.ffn_residual: PreNorm | None = residual(config)
        self.ffn: nn.Module = component("ffn_type", config)(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """x (B, T, C), the residual stream, after this block."""
        if self.x0_mix is not None:
            assert context.x0 is not None
            x = self.x0_mix(x, context.x0)
        return self.combine(x, lambda h: self.dropout(self.attn(h, context)), lambda h: self.dropout(self.ffn(h)))

    def combine(self, x: torch.Tensor, attn: Sublayer, ffn: Sublayer) -> torch.Tensor:
        """x (B, T, C) with both sublayers joined to it."""
        assert self.ffn_residual is not None
        x, pending = self.attn_residual(x, attn)
        x, pending = self.ffn_residual(x, ffn, pending)
        return x if pending is None else x + pending

    def config_values(self) -> dict[str, Any]:
        return {"x0_mix": self.x0_mix is not None, "dropout": self.dropout.p}


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
        x, pending = self.attn_residual(x, lambda h: attn(h) + ffn(h))
        return x if pending is None else x + pending


class GPT(nn.Module):
    """A transformer. `build_model` builds it and initialises its weights."""

    tp_plan: ClassVar[dict[str, str]] = {"token_embedding": "embedding_rowwise", "value_embeddings.*": "colwise",
                                         "lm_head": "colwise_rep"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_kv_head is not None and config.head_dim is not None  # resolved
        self.config = config
        self.kernel_times: dict[str, dict[str, float]] = {}  # see blockgpt/kernels/choose.py
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
        self.mask_documents = config.mask_documents
        needs_norm = component("norm_position", config).final_norm
        self.final_norm = build_norm(config) if needs_norm else nn.Identity()
        self.lm_head = OutputHead(config, self.init.logit_scale)
        if config.weight_tying:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None,
                segment_ids: torch.Tensor | None = None, caches: list[Any] | None = None, reduction: str = "mean",
                head: Callable[["GPT", torch.Tensor], Any] | None = None) -> Any:
        """Logits; with targets the loss alone, so that training never returns logits.

        Args:
            tokens, segment_ids, caches: see `hidden`.
            targets: (B, T) int64; -1 is ignored.
            reduction: see `OutputHead.loss`. To the mean in training, the components' auxiliary losses are added.
            head: computes the result from (model, hidden states) instead. What goes through `forward` works under DDP,
                FSDP and torch.compile; `hidden` alone does not.

        Returns:
            Logits (B, T, V); or the cross-entropy in nats; or what `head` returns.
        """
        h = self.hidden(tokens, segment_ids, caches)
        if head is not None:
            return head(self, h)
        if targets is None:
            return self.lm_head(h)
        loss = self.lm_head.loss(h, targets, reduction)
        aux_loss = self.aux_loss() if self.training and reduction == "mean" else None
        return loss if aux_loss is None else loss + aux_loss

    def hidden(self, tokens: torch.Tensor, segment_ids: torch.Tensor | None = None, caches: list[Any] | None = None
               ) -> torch.Tensor:
        """The residual stream after the last norm, (B, T, C), which the output head reads.

        Args:
            tokens: (B, T) int64.
            segment_ids: (B, T) int64, the document of each token. Read only with mask_documents; without it a sequence
                is one document.
            caches: one per layer, of its attention's `new_cache`, when generating.
        """
        cached = caches[0].length if caches else 0
        positions = torch.arange(cached, cached + tokens.shape[1], device=tokens.device)  # (T,)
        x = self.token_embedding(tokens)  # (B, T, C)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        x = self.dropout(self.embedding_norm(self.position.embed(x, positions)))
        context = ForwardContext(
            positions, {window: self.position.cos_sin(positions, window) for window in self.windows},
            self.masks(positions, cached, segment_ids), caches, segment_ids,
            x if self.blocks[0].x0_mix is not None else None, [table(tokens) for table in self.value_embeddings])
        for block in self.blocks:
            x = block(x, context)
        return self.final_norm(x)

    def masks(self, positions: torch.Tensor, cached: int = 0, segment_ids: torch.Tensor | None = None
              ) -> dict[int | None, Any]:
        """{window: the backend's mask}; positions (T,) follow `cached` tokens in a cache."""
        backend = self.blocks[0].attn.backend
        return {window: backend.mask(self.mask_spec(window, positions, cached, segment_ids)) for window in self.windows}

    def mask_spec(self, window: int | None, positions: torch.Tensor, cached: int = 0,
                  segment_ids: torch.Tensor | None = None) -> AttentionMaskSpec:
        """The `AttentionMaskSpec` of the layers with `window`; positions (T,) follow `cached` tokens in a cache."""
        in_window = cached if window is None else min(cached, window - 1)  # what a cache with this window has stored
        first = cached - in_window
        keys = torch.arange(first, cached + len(positions), device=positions.device) if in_window else positions
        return AttentionMaskSpec(positions, keys, window, self.config.causal,
                                 segment_ids if self.mask_documents else None,
                                 self.position.alibi_slopes(positions.device))

    def attention_kernels(self, dtype: torch.dtype) -> dict[str, str]:
        """{"full" or the window: the kernel that torch chooses at block_size}; empty if the backend has only one."""
        positions = torch.arange(self.config.block_size, device=self.lm_head.weight.device)
        segment_ids = torch.zeros_like(positions)[None]  # (1, T)
        attn = self.blocks[0].attn
        kernels = {str(w or "full"): attn.kernel(self.mask_spec(w, positions, segment_ids=segment_ids), dtype)
                   for w in self.windows}
        return {window: kernel for window, kernel in kernels.items() if kernel}

    @torch.inference_mode()
    def generate(self, tokens: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, vocab_size: int | None = None, stop: int | Sequence[int] | None = None,
                 generator: torch.Generator | Sequence[torch.Generator] | None = None,
                 use_cache: bool = True, on_token: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """Append up to max_new_tokens sampled tokens to tokens (B, T). Returns prompt and new tokens, (B, T + new).

        Beyond block_size the context slides: one full forward pass per token, because every position changes.

        Args:
            tokens: (B, T) int64, the prompts.
            max_new_tokens: tokens to append at most.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample from the k likeliest tokens.
            top_p: sample from the likeliest tokens that together have this probability (Holtzman 2020).
            vocab_size: ids from here on are never sampled (padded rows of the embedding).
            stop: a row that has sampled this token, or one of these, gets only the first of them from then on;
                generation ends when all have.
            generator: source of randomness, on tokens' device; with one for each row, a row does not depend on the
                other rows.
            use_cache: with a KV cache, or a full forward pass per token.
            on_token: called with each new token (B, 1), to show a text while it grows.

        Raises:
            UserError: the model is not causal.
        """
        if not self.config.causal:
            raise UserError("causal=False: a model whose tokens see later ones cannot generate text")
        block_size, training = self.config.block_size, [module for module in self.modules() if module.training]
        try:
            self.eval()
            caches = [block.attn.new_cache() for block in self.blocks] if use_cache else None
            stopped = torch.zeros_like(tokens[:, :1], dtype=torch.bool)
            stops = [stop] if isinstance(stop, int) else list(stop or ())
            stop_tokens = torch.tensor(stops, dtype=torch.int64, device=tokens.device)
            for _ in range(max_new_tokens):
                if caches and tokens.shape[1] <= block_size:
                    h = self.hidden(tokens[:, caches[0].length:], caches=caches)
                else:
                    caches = None
                    h = self.hidden(tokens[:, -block_size:])
                logits = self.lm_head(h[:, -1:])[:, 0].float()  # (B, V)
                token = sample_token(logits, temperature, top_k, top_p, vocab_size, generator)  # (B, 1)
                if stops:
                    token = token.masked_fill(stopped, stops[0])
                    stopped |= torch.isin(token, stop_tokens)
                tokens = torch.cat((tokens, token), dim=1)
                if on_token is not None:
                    on_token(token)
                if stops and bool(stopped.all()):
                    break
            return tokens
        finally:
            for module in training:  # not self.train(): a part of the model may have been in eval mode before
                module.training = True

    def infer_config(self) -> ModelConfig:
        """The config of this model as its components report it, in `config_values` and by their classes.

        A component speaks for those inside it: of several values the outermost counts. What no component reports is
        copied from `self.config`: arch_preset, ffn_multiple_of, which only derives d_ff, and what `init` was given.
        """
        values: dict[str, Any] = {}
        for module in (*self.modules(), self.init, self.blocks[0].attn.backend):
            values = getattr(module, "config_values", dict)() | values
            for axis, table in AXES.items():
                options = {option.load_class(): name for name, option in table.items()}
                # FSDP gives a module a subclass of its class.
                name = next((options[cls] for cls in type(module).__mro__ if cls in options), None)
                if name is not None:
                    values.setdefault(axis, name)
        return dataclasses.replace(self.config, **values)

    def config_values(self) -> dict[str, Any]:
        config = self.config
        windows = [block.attn.window for block in self.blocks]
        sizes = {window for window in windows if window is not None}
        letters = "".join("L" if window is None else "S" for window in windows)
        pattern = (config.window_pattern * len(windows))[:len(windows)]
        is_sqrt = config.embedding_scale == "sqrt" and self.embedding_scale == config.n_embd**0.5
        return {"n_layer": len(self.blocks), "n_embd": self.token_embedding.weight.shape[1],
                "weight_tying": self.lm_head.weight is self.token_embedding.weight,
                "value_embeddings": len(self.value_embeddings),
                "embedding_norm": not isinstance(self.embedding_norm, nn.Identity),
                "embedding_scale": "sqrt" if is_sqrt else self.embedding_scale,
                "mask_documents": self.mask_documents,
                "kernels": max(used_kernels(self).values(), default="torch"),  # triton if one of them is
                "sliding_window": next(iter(sizes)) if sizes else config.sliding_window,
                "window_pattern": config.window_pattern if letters == pattern or not sizes else letters}

    def aux_loss(self) -> torch.Tensor | None:
        """The sum of the components' auxiliary losses of the last forward pass; None if there are none."""
        losses = [report() for report in self._reports("aux_loss")]
        return torch.stack(losses).sum() if losses else None

    def _reports(self, method: str) -> list[Callable[..., Any]]:
        """The bound `method` of every component that has it."""
        return [getattr(module, method) for module in self.modules()  # not hasattr(module, …), which is slow
                if module is not self and (hasattr(type(module), method) or method in module.__dict__)]

    def place_weights(self, device: torch.device) -> None:
        """Let the components move their parameters in memory as suits `device`, as they do when they are moved."""
        for place in self._reports("place_weights"):
            place(device)

    def metrics(self) -> dict[str, torch.Tensor]:
        """{name: mean over the components that report it} of the last forward pass."""
        values: dict[str, list[torch.Tensor]] = {}
        for report in self._reports("metrics"):
            for name, value in report().items():
                values.setdefault(name, []).append(value)
        return {name: torch.stack(tensors).mean() for name, tensors in values.items()}

    def lr_multipliers(self) -> dict[str, float]:
        """{parameter name: factor on its learning rate}, as `init` says; 1 for vectors."""
        return {name: self.init.lr_multiplier(init_role(module), p.shape[-1]) if p.dim() >= 2 else 1.0
                for name, p, module in named_parameters_with_module(self)}

    def parameter_counts(self) -> dict[str, int]:
        """{total, active, trainable, non_embedding}, each parameter once.

        active: those that one token uses; a component that uses only some of its own reports `inactive_parameters`.
        non_embedding omits every embedding table.
        """
        embeddings = {id(m.weight): m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding)}
        total = sum(p.numel() for p in self.parameters())
        inactive = sum(report() for report in self._reports("inactive_parameters"))
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": total, "active": total - inactive, "trainable": trainable,
                "non_embedding": total - sum(embeddings.values())}


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None,
                 vocab_size: int | None, generator: torch.Generator | Sequence[torch.Generator] | None
                 ) -> torch.Tensor:
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
    p = logits.softmax(dim=-1)
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(p, 1, generator=generator)
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p.split(1), generator, strict=True)])


class SkipInit(TorchFunctionMode):
    """Leaves out what torch's modules fill their parameters with: `init_weights` follows.

    On the meta device it would compute nothing, and import torch._dynamo, which takes longer than a small model's step.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **(kwargs or {}))


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
    device = torch.device(device) if device else torch.get_default_device()
    with torch.device("meta"), SkipInit():
        model = GPT(config.resolve(device.type))
    if torch.get_default_device().type == "meta":
        return model
    if parallelize:
        parallelize(model)
    model._apply(lambda p: torch.empty_like(p, device=device) if is_dtensor(p) else  # torch imports sympy for it
                 torch.empty(p.shape, dtype=p.dtype, device=device))
    if config.weight_tying:  # they were untied by that
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
    for name, p in parameters.items():  # all of them before the first is copied
        if p.shape != tensors[name].shape:
            raise UserError(f"{source}: {name} is {tuple(tensors[name].shape)}, this model has {tuple(p.shape)}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])
