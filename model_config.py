"""Every architecture choice as plain data: the axis tables, the presets, and `ModelConfig` with its validation.

Each axis table maps the value of a key to an `Option`: its class, its label in the architecture's name, a line of help.
To add a component: one class in the module that holds its axis, one line in the table here. Nothing else in the project
lists the options. This module does not import torch: configs are parsed, checked, listed and compared without it.
"""

import dataclasses
import importlib.util
import os
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blockgpt.config_fields import check_fields, example_value, key, key_types
from blockgpt.console import terminal_width
from blockgpt.errors import ConfigError, did_you_mean, exit_on_user_error, short_repr


class LazyModule:
    """A module that is imported when an attribute of it is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> typing.Any:
        return getattr(importlib.import_module(self._name), attribute)


if typing.TYPE_CHECKING:  # an editor and the type checker see the modules
    from torch import nn

    import model_attention
    import model_builder
    import model_components
    import model_init
    import model_positions
else:  # importing them imports torch
    nn = LazyModule("torch.nn")
    model_attention = LazyModule("model_attention")
    model_builder = LazyModule("model_builder")
    model_components = LazyModule("model_components")
    model_init = LazyModule("model_init")
    model_positions = LazyModule("model_positions")


class Option(typing.NamedTuple):
    """One value of an axis.

    load_class: returns the class that implements the option; calling it imports torch.
    label: what the option adds to the architecture's name; "" for at most one option of an axis.
    help: one line for tables.
    keys: the configuration keys that this option reads and another option of its axis does not.
    implies: {key: the values allowed with this option, the first by default}.
    unsupported: the keys that must be unset or 0 with this option.
    trains_on: the device types on which it has a backward pass; empty: all.
    masks_fast_on: the device types on which an attention backend needs no mask or score tensor, whatever the mask.
    changes_scores: whether it adds to the attention scores.
    """

    load_class: Callable[[], type[typing.Any]]
    label: str
    help: str
    keys: tuple[str, ...] = ()
    implies: Mapping[str, tuple[str, ...]] = types.MappingProxyType({})
    unsupported: tuple[str, ...] = ()
    trains_on: tuple[str, ...] = ()
    masks_fast_on: tuple[str, ...] = ()
    changes_scores: bool = False

    @property
    def class_name(self) -> str:
        """The name of the class; imports torch."""
        return self.load_class().__name__


def allow_activations(*names: str) -> Mapping[str, tuple[str, ...]]:
    """`implies` of an FFN that fixes its activation to one of `names`."""
    return types.MappingProxyType({"activation": names})


NORMALIZATION = {
    "layernorm": Option(lambda: model_components.LayerNorm, "LN",
                        "mean and variance, scale and shift (Ba 2016)", keys=("norm_eps",)),
    "layernorm_nobias": Option(lambda: model_components.LayerNormNoBias, "LN-NB",
                               "mean and variance, scale only", keys=("norm_eps",)),
    "rmsnorm": Option(lambda: model_components.RMSNorm, "RMS",
                      "root mean square, scale only (Zhang & Sennrich 2019)", keys=("norm_eps",)),
    "rmsnorm_gemma": Option(lambda: model_components.GemmaRMSNorm, "RMS1",
                            "root mean square, scaled by 1 + weight, as in Gemma",
                            keys=("norm_eps",)),
    "dyt": Option(lambda: model_components.DynamicTanh, "DyT",
                  "tanh(alpha x), scale and shift; no statistics (Zhu 2025)"),
}
NORM_POSITION = {
    "pre": Option(lambda: model_components.PreNorm, "PreNorm", "x + f(norm(x)); one more norm before the head"),
    "post": Option(lambda: model_components.PostNorm, "PostNorm", "norm(x + f(x)), as the 2017 Transformer"),
    "sandwich": Option(lambda: model_components.SandwichNorm, "Sandwich", "x + norm(f(norm(x))), as Gemma 2"),
    "reordered": Option(lambda: model_components.ReorderedNorm, "Reordered", "x + norm(f(x)), as OLMo 2"),
}
PARALLEL_BLOCK = {
    "none": Option(lambda: model_builder.Block, "", "attention, then FFN"),
    "one_norm": Option(lambda: model_builder.ParallelBlockOneNorm, "Parallel1",
                       "attention and FFN in parallel on one norm, as GPT-J"),
    "two_norms": Option(lambda: model_builder.ParallelBlock, "Parallel2", "in parallel, a norm each, as GPT-NeoX"),
}
ACTIVATION = {
    "gelu": Option(lambda: nn.GELU, "GELU", "x * Phi(x), exact (Hendrycks & Gimpel 2016)"),
    "gelu_tanh": Option(lambda: model_components.GELUTanh, "GELUtanh",
                        "the tanh approximation that the released GPT-2 uses"),
    "silu": Option(lambda: nn.SiLU, "SiLU", "x * sigmoid(x)"),
    "relu": Option(lambda: nn.ReLU, "ReLU", "max(x, 0)"),
    "relu2": Option(lambda: model_components.ReLU2, "ReLU2", "max(x, 0) squared (So 2021)"),
    "leaky_relu": Option(lambda: nn.LeakyReLU, "LeakyReLU", "max(x, 0.01 x)"),
}
FFN_TYPE = {
    "standard": Option(lambda: model_components.StandardFFN, "",
                       "down(activation(up(x))), d_ff = 4 n_embd", keys=("activation",)),
    "swiglu": Option(lambda: model_components.SwiGLU, "SwiGLU",
                     "down(silu(gate(x)) * up(x)), d_ff = 8/3 n_embd (Shazeer 2020)",
                     implies=allow_activations("silu")),
    "geglu": Option(lambda: model_components.GEGLU, "GEGLU",
                    "the same with GELU, exact or tanh (Shazeer 2020; tanh: Gemma)",
                    keys=("activation",), implies=allow_activations("gelu", "gelu_tanh")),
    "reglu": Option(lambda: model_components.ReGLU, "ReGLU",
                    "the same with ReLU (Shazeer 2020)", implies=allow_activations("relu")),
}
POSITION_ENCODING = {
    "learned_absolute": Option(lambda: model_positions.LearnedAbsolutePositions, "AbsPos",
                               "a trained vector for each position"),
    "sinusoidal": Option(lambda: model_positions.SinusoidalPositions, "SinPos",
                         "fixed waves added to the embedding (Vaswani 2017)"),
    "rope": Option(lambda: model_positions.RotaryPositions, "RoPE", "queries and keys rotated by position (Su 2021)",
                   keys=("rope_theta", "rope_theta_local", "rope_fraction", "rope_pattern", "rope_scaling")),
    "alibi": Option(lambda: model_positions.AlibiPositions, "ALiBi",
                    "scores fall with distance, each head at its own rate (Press 2022)", changes_scores=True),
    "none": Option(lambda: model_positions.NoPositions, "NoPE", "only the causal mask orders the tokens (Haviv 2022)"),
}
ROPE_SCALING = {
    "none": Option(lambda: model_positions.NoScaling, "", "frequencies unchanged"),
    "linear": Option(lambda: model_positions.LinearScaling, "Linear",
                     "all frequencies divided by the factor (Chen 2023)", keys=("rope_scaling_factor",)),
    "llama3": Option(lambda: model_positions.Llama3Scaling, "Llama3",
                     "low frequencies divided by the factor, high ones unchanged, as Llama 3.1",
                     keys=("rope_scaling_factor", "rope_original_context")),
    "yarn": Option(lambda: model_positions.YarnScaling, "YaRN",
                   "by turns over the original context, and scores scaled up (Peng 2023)",
                   keys=("rope_scaling_factor", "rope_original_context")),
}
ATTENTION_TYPE = {
    "standard": Option(lambda: model_attention.StandardAttention, "", "multi-head or grouped-query attention"),
}
ATTENTION_BACKEND = {  # `auto`: see `ModelConfig.auto_backend`
    "sdpa": Option(lambda: model_attention.SDPABackend, "",
                   "torch's fused scaled_dot_product_attention", unsupported=("attn_softcap",)),
    "manual": Option(lambda: model_attention.ManualBackend, "",
                     "softmax(q k^T) v written out: the readable reference"),
    "flex": Option(lambda: model_attention.FlexBackend, "",
                   "torch's flex_attention: masks and score changes compiled into one kernel",
                   unsupported=("dropout",), trains_on=("cuda",), masks_fast_on=("cuda",)),
}
QK_NORM = {
    "none": Option(lambda: model_attention.NoQKNorm, "", "queries and keys unchanged"),
    "head": Option(lambda: model_attention.QKNormPerHead, "QKNorm",
                   "each head of them normalised, as in Qwen3 and Gemma 3"),
    "projection": Option(lambda: model_attention.QKNormProjection, "QKNormFull",
                         "all heads of them normalised as one vector, as in OLMo 2"),
}
ATTN_GATE = {
    "none": Option(lambda: model_attention.NoGate, "", "the output of attention goes to the output projection"),
    "elementwise": Option(lambda: model_attention.ElementwiseGate, "Gated",
                          "times sigmoid(gate(x)), one value per channel (Qiu 2025)"),
    "headwise": Option(lambda: model_attention.HeadwiseGate, "GatedHead",
                       "times sigmoid(gate(x)), one value per head (Qiu 2025)"),
}
INIT = {
    "gpt2": Option(lambda: model_init.GPT2Init, "",
                   "N(0, init_std), what writes to the residual stream / sqrt(2 n_layer)"),
    "normal": Option(lambda: model_init.NormalInit, "NormalInit", "N(0, init_std) throughout"),
    "mup": Option(lambda: model_init.MuPInit, "muP",
                  "gpt2's at mup_base_width; wider: weights, rates and logits scaled (Yang 2022)",
                  keys=("mup_base_width",)),
}
AXES: dict[str, dict[str, Option]] = {
    "normalization": NORMALIZATION,
    "norm_position": NORM_POSITION,
    "parallel_block": PARALLEL_BLOCK,
    "activation": ACTIVATION,
    "ffn_type": FFN_TYPE,
    "position_encoding": POSITION_ENCODING,
    "rope_scaling": ROPE_SCALING,
    "attention_type": ATTENTION_TYPE,
    "attention_backend": ATTENTION_BACKEND,
    "qk_norm": QK_NORM,
    "attn_gate": ATTN_GATE,
    "init": INIT,
}

# Presets name components, never sizes: sizes come from config/size_*.py or the command line.
PRESETS: dict[str, tuple[str, dict[str, typing.Any]]] = {
    "gpt2": ("This project's GPT-2: post-norm and free of biases. The released one is gpt2_openai.",
             dict(normalization="layernorm_nobias", norm_position="post", activation="gelu", ffn_type="standard",
                  position_encoding="learned_absolute", bias=False, weight_tying=True)),
    "gpt2_openai": ("GPT-2 as OpenAI released it (Radford 2019): pre-norm, biases everywhere, tanh GELU.",
                    dict(normalization="layernorm", norm_position="pre", activation="gelu_tanh", ffn_type="standard",
                         position_encoding="learned_absolute", bias=True, weight_tying=True)),
    "llama": ("LLaMA (Touvron 2023): RoPE, RMSNorm, SwiGLU, pre-norm, untied head.",
              dict(normalization="rmsnorm", norm_position="pre", ffn_type="swiglu",
                   position_encoding="rope", bias=False, weight_tying=False)),
    "llama3": ("Llama 3 (Grattafiori 2024): LLaMA with RoPE's base at 500,000. Its 8B adds n_kv_head=8; 3.1 and "
               "later rope_scaling=llama3.",
               dict(normalization="rmsnorm", norm_position="pre", ffn_type="swiglu", position_encoding="rope",
                    rope_theta=500_000.0, bias=False, weight_tying=False)),
    "qwen3": ("Qwen3 (Yang 2025): LLaMA with each head's queries and keys normalised. Its heads are 128 wide "
              "(head_dim); up to 4B the head is tied, as here.",
              dict(normalization="rmsnorm", norm_eps=1e-6, norm_position="pre", ffn_type="swiglu",
                   position_encoding="rope", rope_theta=1_000_000.0, qk_norm="head", bias=False, weight_tying=True)),
    "gemma2": ("Gemma 2 (Gemma Team 2024): sandwich norms, GEGLU, softcaps, every other layer sees 4,096 tokens.",
               dict(normalization="rmsnorm_gemma", norm_eps=1e-6, norm_position="sandwich", ffn_type="geglu",
                    activation="gelu_tanh", position_encoding="rope", attn_softcap=50.0, logit_softcap=30.0,
                    sliding_window=4096, window_pattern="SL", embedding_scale="sqrt", bias=False, weight_tying=True)),
    "gemma3": ("Gemma 3 (Gemma Team 2025): Gemma 2 with QK-norm for softcaps; of six layers five see 512 tokens, as "
               "its 1B, and have a separate RoPE base.",
               dict(normalization="rmsnorm_gemma", norm_eps=1e-6, norm_position="sandwich", ffn_type="geglu",
                    activation="gelu_tanh", position_encoding="rope", rope_theta=1_000_000.0,
                    rope_theta_local=10_000.0, qk_norm="head", sliding_window=512, window_pattern="SSSSSL",
                    embedding_scale="sqrt", bias=False, weight_tying=True)),
    "olmo2": ("OLMo 2 (OLMo Team 2025): norms on the outputs of the sublayers, QK-norm over all heads as one vector.",
              dict(normalization="rmsnorm", norm_eps=1e-6, norm_position="reordered", ffn_type="swiglu",
                   position_encoding="rope", rope_theta=500_000.0, qk_norm="projection", bias=False,
                   weight_tying=False)),
    "neox": ("GPT-NeoX and Pythia (Black 2022, Biderman 2023): attention and FFN in parallel, RoPE on a quarter of "
             "each head, biases.",
             dict(normalization="layernorm", norm_position="pre", parallel_block="two_norms", activation="gelu",
                  ffn_type="standard", position_encoding="rope", rope_fraction=0.25, bias=True, weight_tying=False)),
    "modern": ("The best small model of docs/BENCHMARKS.md: LLaMA with a tied head and each head's "
               "queries and keys normalised.",
               dict(normalization="rmsnorm", norm_position="pre", ffn_type="swiglu", position_encoding="rope",
                    qk_norm="head", bias=False, weight_tying=True)),
    "team": ("A preset kept for an existing line of models called model_v1: LLaMA's components (RoPE, RMSNorm, SwiGLU, "
             "pre-norm) with the head tied to the embedding.",
             dict(normalization="rmsnorm", norm_position="pre", ffn_type="swiglu",
                  position_encoding="rope", bias=False, weight_tying=True)),
    "hybrid": ("RoPE in a GPT-2 body: bias-free LayerNorm, GELU, pre-norm, tied head.",
               dict(normalization="layernorm_nobias", norm_position="pre", activation="gelu", ffn_type="standard",
                    position_encoding="rope", bias=False, weight_tying=True)),
    "custom": ("The default of every axis (nanoGPT's architecture), to be overridden one by one.", dict()),
}


def axis(name: str, default: str, help: str) -> typing.Any:
    """The key that chooses an option of axis `name`."""
    return key(default, help, group="architecture", choices=AXES[name])


def divisors(n: int, at_most: int = 256) -> str:
    """The divisors of `n` up to `at_most`, as text."""
    return ", ".join(str(d) for d in range(1, min(n, at_most) + 1) if n % d == 0)


# The keys at the beginning of every architecture name, and those that names omit, with the reason.
NAME_HEAD = ("n_layer", "n_head", "n_kv_head", "n_embd", "position_encoding", "normalization", "ffn_type", "activation",
             "norm_position")
NAME_OMITS = {
    "arch_preset": "only a source of values for the other keys",
    "attention_backend": "the same mathematics in another kernel",
    "ffn_multiple_of": "read only to derive d_ff, which the name shows",
    "block_size": "the length of the training sequences: belongs to the data and the budget of a run",
    "vocab_size": "the size of the dataset's tokenizer",
    "loss_chunk": "the same mathematics in less memory",
    "kernels": "the same mathematics in another kernel",
}


def auto_loss_chunk(vocab_size: int) -> int:
    """Tokens of loss_chunk=auto: the power of two whose logits take at most 1 GiB in float32.

    A micro-batch of no more tokens is not cut, and its loss is the plain one to the last bit.
    """
    return 1 << max(2**28 // vocab_size, 1).bit_length() - 1


def format_label(label: str, value: typing.Any) -> str:
    """What `value` adds to an architecture's name. `label` is "FF{}", a word, or "word if False|word if True"."""
    if isinstance(value, bool):
        return label.split("|")[value] if "|" in label else label
    return label.format(value if isinstance(value, str) else short_number(value))


def short_number(value: float) -> str:
    """A number as short text that no other number has: 1M, 500k, 1024, 0.5, 1e-6."""
    for unit, suffix in ((1_000_000, "M"), (1000, "k")):
        if 10_000 <= value < 1e15 and value % unit == 0:
            return f"{int(value) // unit}{suffix}"
    text = repr(value).removesuffix(".0")
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


@dataclass(frozen=True)
class ModelConfig:
    """The description of one transformer.

    `None` means either "derived from other keys" (`resolve()` fills it in) or "off", as the key's line of help says.
    The default sizes are those of GPT-2 124M.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or is incompatible with another. It names the key.
    """

    arch_preset: str = key("custom", "named set of components; explicit keys override it", group="architecture",
                           choices=PRESETS, example="gpt2")
    normalization: str = axis("normalization", "layernorm_nobias", "norm of the residual stream")
    norm_eps: float = key(1e-5, "added to the variance before the root", group="architecture", above=0.0, label="eps{}",
                          example=1e-6)
    norm_position: str = axis("norm_position", "pre", "position of the norms around attention and FFN")
    parallel_block: str = axis("parallel_block", "none", "attention and FFN in sequence, or in parallel")
    activation: str | None = key(None, "inside the FFN; None: gelu, or the one that a gated FFN implies",
                                 group="architecture", choices=AXES["activation"])
    ffn_type: str = axis("ffn_type", "standard", "feed-forward network")
    d_ff: int | None = key(None, "FFN width; None: 4 n_embd, or 8/3 n_embd where gated, rounded up to ffn_multiple_of",
                           group="architecture", minimum=1, maximum=100_000_000, label="FF{}", example=96)
    ffn_multiple_of: int | None = key(None, "a derived d_ff is rounded up to a multiple of it; None: 64 where gated, "
                                      "else 1", group="architecture", minimum=1, maximum=1_000_000, example=48)
    position_encoding: str = axis("position_encoding", "learned_absolute", "how positions enter the model")
    rope_theta: float = key(10000.0, "base of RoPE's wavelengths", group="architecture", above=1.0, label="theta{}",
                            example=100_000.0)
    rope_theta_local: float | None = key(None, "the base in layers with a window, unscaled; None: rope_theta",
                                         group="architecture", above=1.0, label="local{}", example=1000.0)
    rope_fraction: float = key(1.0, "fraction of each head that RoPE rotates", group="architecture", above=0.0,
                               maximum=1.0, label="rot{}", example=0.5)
    rope_pattern: str = key("R", "R: a layer with RoPE, N: without positions, as SmolLM 3's; repeated over the layers",
                            group="architecture", label="{}", example="RN")
    rope_scaling: str = axis("rope_scaling", "none", "RoPE for a longer context than the model was trained on")
    rope_scaling_factor: float = key(8.0, "the longer context over the original one", group="architecture", minimum=1.0,
                                     label="x{}", example=4.0)
    rope_original_context: int | None = key(None, "tokens of the original context; None: block_size / "
                                            "rope_scaling_factor", group="architecture", minimum=1, label="ctx{}",
                                            example=8192)
    attention_type: str = axis("attention_type", "standard", "the attention module: its projections and its cache")
    attention_backend: str = key("auto", "implementation of attention, same mathematics; auto: by device, mask and "
                                 "scores", group="architecture", choices=("auto", *ATTENTION_BACKEND))
    qk_norm: str = axis("qk_norm", "none", "norm of queries and keys, of the type that normalization names")
    attn_gate: str = axis("attn_gate", "none", "gate on the output of attention")
    attn_scale: float | None = key(None, "factor on q k^T; None: 1 / sqrt(head_dim), with init=mup times "
                                   "sqrt(mup_base_width / n_embd)",
                                   group="architecture", above=0.0, label="scale{}", example=0.1)
    attn_softcap: float | None = key(None, "c tanh(scores / c); None: no cap", group="architecture", above=0.0,
                                     label="cap{}", example=50.0)
    logit_softcap: float | None = key(None, "c tanh(logits / c); None: no cap", group="architecture", above=0.0,
                                      label="logitcap{}", example=30.0)
    logit_scale: float = key(1.0, "factor on the logits, before logit_softcap", group="architecture", above=0.0,
                             label="logits{}", example=0.125)
    sliding_window: int | None = key(None, "tokens that a layer with a window sees, itself included; None: no windows",
                                     group="architecture", minimum=1, label="SW{}", example=32)
    window_pattern: str = key("S", "S: a layer with the window, L: without; repeated over the layers",
                              group="architecture", label="{}", example="SL")
    causal: bool = key(True, "tokens see no later ones; False is for objectives other than next-token prediction",
                       group="architecture", label="NonCausal")
    mask_documents: bool = key(False, "tokens see only their own document", group="architecture", label="DocMask")
    bias: bool = key(False, "biases in the linear layers of attention and FFN", group="architecture", label="Bias")
    qkv_bias: bool | None = key(None, "biases of queries, keys and values; None: as bias", group="architecture",
                                label="NoQKVBias|QKVBias", example=True)
    head_bias: bool = key(False, "bias of the output head", group="architecture", label="HeadBias")
    weight_tying: bool = key(True, "the output head uses the token embedding's weights", group="architecture",
                             label="Untied|Tied")
    embedding_scale: float | str = key(1.0, "factor on token embeddings; sqrt: sqrt(n_embd)", group="architecture",
                                       above=0.0, label="emb{}", example="sqrt")
    embedding_norm: bool = key(False, "norm on the embeddings", group="architecture", label="EmbNorm")
    residual_scale: float = key(1.0, "factor on what a sublayer adds to the stream", group="architecture", above=0.0,
                                label="res{}", example=0.5)
    x0_mix: bool = key(False, "each block mixes the embeddings back in, by trained weights (modded-nanogpt)",
                       group="architecture", label="X0")
    value_embeddings: int = key(0, "tables of token embeddings added to the values of the first and, in reverse, the "
                                "last layers (modded-nanogpt)", group="architecture", minimum=0, label="VE{}",
                                example=1)
    dropout: float = key(0.0, "on embeddings, attention weights and sublayer outputs", group="architecture",
                         minimum=0.0, below=1.0, label="drop{}", example=0.1)
    init: str = axis("init", "gpt2", "initialisation of the weights")
    init_std: float = key(0.02, "standard deviation of the initial weights", group="architecture", minimum=0.0,
                          label="std{}", example=0.01)
    zero_init_residual: bool = key(False, "projections that write to the residual stream are initialised to 0",
                                   group="architecture", label="Zero")
    mup_base_width: int = key(256, "n_embd at which the learning rate was tuned", group="architecture", minimum=1,
                              maximum=1_000_000, label="base{}", example=128)
    # No machine can hold the largest sizes. They catch typing errors, on which torch would fail or hang much later.
    n_layer: int = key(12, "blocks", group="size", minimum=1, maximum=10_000, example=6)
    n_head: int = key(12, "query heads", group="size", minimum=1, maximum=100_000, example=8)
    n_kv_head: int | None = key(None, "key/value heads; None: n_head; fewer: grouped-query attention",
                                group="size", minimum=1, example=1)
    n_embd: int = key(768, "width of the residual stream", group="size", minimum=1, maximum=1_000_000, example=384)
    head_dim: int | None = key(None, "width of a head; None: n_embd / n_head", group="size", minimum=1,
                               maximum=1_000_000, label="HD{}", example=128)
    block_size: int = key(1024, "tokens of context", group="size", minimum=1, maximum=100_000_000, example=512)
    vocab_size: int = key(50257, "rows of the embedding; if not set, a run takes its dataset's, rounded up to 64",
                          group="size", minimum=1, maximum=2**32, example=50304)
    loss_chunk: int | str = key("auto", "tokens whose logits exist at once in head and loss; 0: all of a micro-batch; "
                                "auto: as many as take up to 1 GiB in float32", group="system", minimum=0, example=16)
    kernels: str = key("auto", "of norms, RoPE and the gates of FFNs: torch's, or this project's in Triton; auto: on "
                       "CUDA the faster at the run's shapes, else torch's", group="system",
                       choices=("auto", "torch", "triton"))

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_heads()
        for name, values in self.implied().items():
            if getattr(self, name) not in (None, *values):
                raise self.incompatible_key(name)
        if isinstance(self.embedding_scale, str) and self.embedding_scale != "sqrt":
            raise ConfigError("embedding_scale", f"{short_repr(self.embedding_scale)} is unknown (a number, or sqrt)")
        if isinstance(self.loss_chunk, str) and self.loss_chunk != "auto":
            raise ConfigError("loss_chunk", f"{short_repr(self.loss_chunk)} is unknown (a number of tokens, or auto)")
        if not set(self.window_pattern) <= set("SL"):
            raise ConfigError("window_pattern", f"{short_repr(self.window_pattern)} has other letters than S (a layer "
                                                "with the sliding_window) and L (one without)")
        if not set(self.rope_pattern) <= set("RN") or "R" not in self.rope_letters():
            raise ConfigError("rope_pattern", f"{short_repr(self.rope_pattern)} is not of R (a layer with RoPE) and N "
                                              "(one without), with one R in the layers (or position_encoding=none)")
        if self.parallel_block == "two_norms" and self.norm_position == "post":
            raise ConfigError("parallel_block", "two_norms is incompatible with norm_position=post, which has one "
                                                "norm, on the sum (use one_norm, or another norm_position)")
        if 2 * self.value_embeddings > self.n_layer:
            raise ConfigError("value_embeddings", f"{self.value_embeddings} tables, each for one of the first and one "
                              f"of the last layers, are too many for n_layer={self.n_layer} (at most "
                              f"{self.n_layer // 2})")
        supported, chosen = self.supported_backends(), self.attention_backend
        if chosen not in ("auto", *supported):
            name = next(k for k in ATTENTION_BACKEND[chosen].unsupported if getattr(self, k))
            raise ConfigError("attention_backend", f"{chosen} does not support {name}={getattr(self, name):g} "
                                                   f"(use {' or '.join(supported)}, or auto)")

    def _check_heads(self) -> None:
        """Raise `ConfigError` for widths and numbers of heads that do not divide."""
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ConfigError("n_head", f"{self.n_head} does not divide n_embd={self.n_embd} "
                                        f"(one of {divisors(self.n_embd)}; or set head_dim)")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise ConfigError("n_kv_head", f"{self.n_kv_head} does not divide n_head={self.n_head} "
                                           f"(one of {divisors(self.n_head)})")
        if self.position_encoding == "rope" and (self.rotary_dim() % 2 or not self.rotary_dim()):
            width = f"head_dim={self.head_dim}" if self.head_dim else f"n_embd={self.n_embd} / n_head={self.n_head}"
            fraction = f" × rope_fraction={self.rope_fraction:g}" if self.rope_fraction != 1 else ""
            raise ConfigError("position_encoding", "rope rotates pairs and needs an even head width, not "
                                                   f"{width}{fraction} (change that, or the position_encoding)")

    def flat(self) -> dict[str, typing.Any]:
        """{key: value}, as the run log records it."""
        return dataclasses.asdict(self)

    def supported_backends(self) -> list[str]:
        """The attention backends that support the values of the other keys."""
        return [name for name, o in ATTENTION_BACKEND.items() if not any(getattr(self, k) for k in o.unsupported)]

    def check_trainable_on(self, device_type: str) -> None:
        """Raise `ConfigError` if a kernel or a backward pass is missing on `device_type` ("cpu", "cuda", "mps")."""
        self.check_kernels_on(device_type)
        trains_on = ATTENTION_BACKEND[self.resolve(device_type).attention_backend].trains_on
        if trains_on and device_type not in trains_on:
            others = [name for name in self.supported_backends() if not ATTENTION_BACKEND[name].trains_on]
            raise ConfigError("attention_backend", f"{self.attention_backend!r} has no backward pass on {device_type}, "
                              f"only on {' and '.join(trains_on)} (use {' or '.join(others)} here)")

    def has_kernels(self) -> bool:
        """Whether a component of the model has a kernel of this project."""
        return (self.is_gated() or self.position_encoding == "rope"
                or self.normalization in ("layernorm", "layernorm_nobias", "rmsnorm", "rmsnorm_gemma"))

    def check_kernels_on(self, device_type: str) -> None:
        """Raise `ConfigError` if kernels=triton cannot run on `device_type` of this computer."""
        if self.kernels != "triton":
            return
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("kernels", "'triton': Triton is not installed; it exists for Linux (pip install -r "
                                         "requirements.txt there, or --kernels=auto)")
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError("kernels", f"'triton' needs a CUDA device, this is {device_type} (--kernels=auto)")

    def rotary_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
        return int((self.head_dim or self.n_embd // self.n_head) * self.rope_fraction)

    def rope_letters(self) -> str:
        """A letter of rope_pattern for each layer."""
        return (self.rope_pattern * self.n_layer)[:self.n_layer]

    def window(self, layer: int) -> int | None:
        """Tokens that layer `layer` (from 0) sees, itself included; None: all of its context."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return self.sliding_window if letter == "S" else None

    def value_table(self, layer: int) -> int | None:
        """The index of the table of value embeddings that layer `layer` (from 0) reads, or None."""
        from_the_end = self.n_layer - 1 - layer
        return next((i for i in (layer, from_the_end) if i < self.value_embeddings), None)

    def auto_backend(self, device_type: str) -> str:
        """The attention backend that `auto` means on a device: the first of the table that supports the other keys.

        Where the mask is more than the causal triangle, or scores are changed, a backend comes first that needs no
        tensor of the size of the scores for it on this device.
        """
        able = [name for name in self.supported_backends()
                if not ATTENTION_BACKEND[name].trains_on or device_type in ATTENTION_BACKEND[name].trains_on]
        windows = [self.window(layer) for layer in range(self.n_layer)]
        changes_scores = POSITION_ENCODING[self.position_encoding].changes_scores or self.attn_softcap is not None
        if changes_scores or self.mask_documents or any(w is not None and w < self.block_size for w in windows):
            able.sort(key=lambda name: device_type not in ATTENTION_BACKEND[name].masks_fast_on)
        return able[0]

    def is_gated(self) -> bool:
        """Whether the FFN has a gate, and so three matrices."""
        return "activation" in FFN_TYPE[self.ffn_type].implies

    def default_ffn_multiple(self) -> int:
        """ffn_multiple_of where it is None."""
        return 64 if self.is_gated() else 1

    def default_d_ff(self, n_embd: int, multiple_of: int | None = None) -> int:
        """d_ff where it is None, in a model of width `n_embd`; rounded up to ffn_multiple_of, or to `multiple_of`."""
        multiple = multiple_of or self.ffn_multiple_of or self.default_ffn_multiple()
        thirds = 8 * n_embd if self.is_gated() else 12 * n_embd
        return -(-thirds // (3 * multiple)) * multiple

    def derived(self, device_type: str = "cpu") -> dict[str, typing.Any]:
        """{key: the value that None (or auto) means} of the keys that follow from others, on a type of device."""
        context = max(1, int(self.block_size / self.rope_scaling_factor))
        reads_context = "rope_original_context" in ROPE_SCALING[self.rope_scaling].keys
        return {
            **({"rope_original_context": context} if reads_context else {}),
            "n_kv_head": self.n_head,
            "head_dim": self.n_embd // self.n_head,
            "activation": self.implied().get("activation", ("gelu",))[0],
            "ffn_multiple_of": self.default_ffn_multiple(),
            "d_ff": self.default_d_ff(self.n_embd),
            "qkv_bias": self.bias,
            "attention_backend": self.auto_backend(device_type),
            "loss_chunk": auto_loss_chunk(self.vocab_size),
            "kernels": "torch",  # a run on CUDA measures, and may change it (blockgpt/kernels/choose.py)
        }

    def resolve(self, device_type: str = "cpu") -> "ModelConfig":
        """The same model with every derived key filled in: `build_model` builds it and the log records it.

        device_type: where it runs ("cpu", "cuda", "mps"), for attention_backend=auto.
        """
        unset = {k: v for k, v in self.derived(device_type).items() if getattr(self, k) in (None, "auto")}
        return dataclasses.replace(self, **unset)

    def options(self) -> dict[str, Option]:
        """{axis: Option} of the choices in force."""
        full = self.resolve()
        return {name: table[getattr(full, name)] for name, table in AXES.items()}

    def implied(self) -> dict[str, tuple[str, ...]]:
        """{key: the values allowed} by the chosen components themselves (SwiGLU's activation is SiLU)."""
        chosen = [option for option in map(self.option, AXES) if option]
        return {k: values for option in chosen for k, values in option.implies.items()}

    def option(self, name: str) -> Option | None:
        """The `Option` of axis `name`, or None where the choice is derived."""
        return AXES[name].get(getattr(self, name))

    def incompatible_key(self, name: str) -> ConfigError:
        """The `ConfigError` for an explicit `name` together with an FFN that implies its value."""
        return ConfigError(name, f"{getattr(self, name)!r} is incompatible with ffn_type={self.ffn_type}, which "
                                 f"implies {' or '.join(self.implied()[name])} (drop it, set it to None, or use "
                                 "ffn_type=standard)")

    def unused_keys(self) -> dict[str, str]:
        """{key: reason} of the keys that a model built from this config does not read."""
        unused: dict[str, str] = {}
        for name, table in AXES.items():
            chosen = self.option(name)
            for k in {k for option in table.values() for k in option.keys}:
                if name in unused:
                    unused[k] = unused[name]
                elif chosen and k not in chosen.keys and k not in chosen.implies:
                    readers = " or ".join(o for o, option in table.items() if k in option.keys)
                    unused[k] = f"only {name}={readers} reads it, and this is {getattr(self, name)}"
        windows = {self.window(layer) for layer in range(self.n_layer)}
        rotated = {self.window(layer) for layer, letter in enumerate(self.rope_letters()) if letter == "R"}
        if self.sliding_window is None:
            unused["window_pattern"] = "sliding_window is not set"
        elif windows == {None}:
            unused["sliding_window"] = f"window_pattern={self.window_pattern} gives it to none of the layers"
        if windows == {None}:
            unused.setdefault("rope_theta_local", "no layer has a window")
        elif rotated == {None}:
            unused.setdefault("rope_theta_local", f"rope_pattern={self.rope_pattern}: no layer with a window has RoPE")
        elif None not in rotated and self.rope_theta_local is not None:
            unused |= dict.fromkeys(("rope_theta", "rope_scaling", "rope_scaling_factor", "rope_original_context"),
                                    "every layer with RoPE has a window and uses rope_theta_local")
        if self.d_ff is not None:
            unused["ffn_multiple_of"] = "d_ff is set"
        if not self.has_kernels():
            unused["kernels"] = "the model has no norm, RoPE or gated FFN with a kernel"
        return unused

    def name_defaults(self) -> dict[str, typing.Any]:
        """{key: the value that an architecture name does not show}: the default, or what follows from keys in the name.

        weight_tying: tied with learned_absolute positions, as in GPT-2; untied with other positions, as in LLaMA.
        """
        return {**{f.name: f.default for f in dataclasses.fields(self)}, **self.derived(),
                "weight_tying": self.position_encoding == "learned_absolute",
                "d_ff": self.default_d_ff(self.n_embd, self.default_ffn_multiple()),
                "rope_original_context": None}  # it follows from block_size, which names omit: always shown

    def arch_name(self) -> str:
        """Size and components on one line, e.g. 12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm.

        Keys whose value is not that of `name_defaults` are appended, in the order of the keys. Two configs have the
        same name only if they differ in `NAME_OMITS` or in keys that the model does not read.
        """
        o, full, usual = self.options(), self.resolve(), self.name_defaults()
        heads = f"{self.n_head}H" if full.n_kv_head == self.n_head else f"{self.n_head}H{full.n_kv_head}KV"
        ffn = [o["ffn_type"].label] if o["ffn_type"].label else []
        ffn += [] if ffn and full.activation == usual["activation"] else [o["activation"].label]
        words = [f"{self.n_layer}L", heads, f"{self.n_embd}D", o["position_encoding"].label, o["normalization"].label,
                 *ffn, o["norm_position"].label]
        omitted = {*NAME_HEAD, *NAME_OMITS, *self.unused_keys()}
        for f in dataclasses.fields(self):
            value = getattr(full, f.name)
            if f.name in omitted:
                continue
            if f.name in AXES:
                words += [o[f.name].label] if o[f.name].label else []
            elif value != usual[f.name]:
                words.append(format_label(f.metadata["label"], value))
        return "-".join(words)


def example_values() -> dict[str, tuple[typing.Any, ...]]:
    """{key: values of it for tests and tables}: all options of an axis; for other keys the default and an example.

    An axis that has one option only is left out.
    """
    accepted = key_types(ModelConfig)
    return {f.name: tuple(AXES[f.name]) if f.name in AXES else (f.default, example_value(f, accepted[f.name]))
            for f in dataclasses.fields(ModelConfig) if len(AXES.get(f.name, "..")) > 1}


def apply_preset(overrides: Mapping[str, typing.Any]) -> ModelConfig:
    """ModelConfig from explicit keys over the preset that they name (`arch_preset`), over the defaults."""
    name = overrides.get("arch_preset", "custom")
    if name not in PRESETS:
        raise ConfigError("arch_preset", f"{short_repr(name)} is unknown{did_you_mean(name, PRESETS)}")
    components = dict(PRESETS[name][1])
    ffn = overrides.get("ffn_type", components.get("ffn_type"))
    if ffn in FFN_TYPE:  # a preset's activation is dropped where the explicit FFN implies another
        for k, values in FFN_TYPE[ffn].implies.items():
            if components.get(k) not in values:
                components.pop(k, None)
    return ModelConfig(**{**components, **overrides})


def get_preset(name: str, **overrides: typing.Any) -> ModelConfig:
    """The preset `name` with `overrides` on top; sizes are GPT-2's 124M unless overridden."""
    return apply_preset({**overrides, "arch_preset": name})


def list_presets() -> None:
    """Print each preset: its name, its description, its components."""
    with exit_on_user_error():  # it is a command, too: python -c "from model_config import list_presets; …"
        for name, (summary, _) in PRESETS.items():
            c = get_preset(name)
            o = c.options()
            width = terminal_width() - 1
            print(textwrap.fill(summary, width, initial_indent=f"{name:12} ", subsequent_indent=" " * 13))
            components = (f"{o['position_encoding'].label} · {o['normalization'].label} (eps {c.norm_eps:g}) · "
                          f"{o['ffn_type'].label or o['activation'].label} · {o['norm_position'].label} · "
                          f"bias {'yes' if c.bias else 'no'} · head {'tied' if c.weight_tying else 'untied'}")
            print(textwrap.fill(components, width, initial_indent=" " * 13, subsequent_indent=" " * 13))
            print(f"{'':12} {c.arch_name()}\n")
