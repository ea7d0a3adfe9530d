"""Every architecture choice as plain data: what can be chosen, what it is called, what fits together.

Each axis table maps an option to the name of its class in `model_components.py`, its label in the
architecture name and a line of help. A new component is one class there and one line here; nothing
else in the project lists the options. Torch is never imported: configs are read, checked, listed
and compared without it.
"""

import dataclasses
import textwrap
import types
import typing
from dataclasses import dataclass

from blockgpt.config_fields import check_fields, key
from blockgpt.errors import ConfigError, did_you_mean, short_repr


class Option(typing.NamedTuple):
    """One value of an axis. `keys`: the configuration keys that not every option of its axis reads, but this one does.

    implies: {key: the values it may have beside this option, the first by default}. cannot: keys that must be unset
    or 0 beside it. trains_on: the only device types that it has a backward pass for, if not all.
    """

    cls: str
    label: str
    help: str
    keys: tuple = ()
    implies: types.MappingProxyType = types.MappingProxyType({})
    cannot: tuple = ()
    trains_on: tuple = ()


def activations(*names):
    """What a gated FFN says of the activation, which is part of its name."""
    return types.MappingProxyType({"activation": names})


NORMALIZATION = {
    "layernorm": Option("LayerNorm", "LN", "mean and variance, scale and shift (Ba 2016)", keys=("norm_eps",)),
    "layernorm_nobias": Option("LayerNormNoBias", "LN-NB", "mean and variance, scale only", keys=("norm_eps",)),
    "rmsnorm": Option("RMSNorm", "RMS", "root mean square, scale only (Zhang & Sennrich 2019)", keys=("norm_eps",)),
    "rmsnorm_gemma": Option("GemmaRMSNorm", "RMS1", "root mean square, scaled by 1 + w, as Gemma has it",
                            keys=("norm_eps",)),
    "dyt": Option("DynamicTanh", "DyT", "tanh(alpha x), scale and shift; no statistics (Zhu 2025)"),
}
NORM_POSITION = {
    "pre": Option("PreNorm", "PreNorm", "x + f(norm(x)); one more norm before the head"),
    "post": Option("PostNorm", "PostNorm", "norm(x + f(x)), as the 2017 Transformer"),
    "sandwich": Option("SandwichNorm", "Sandwich", "x + norm(f(norm(x))), as Gemma 2"),
    "reordered": Option("ReorderedNorm", "Reordered", "x + norm(f(x)), as OLMo 2"),
}
PARALLEL_BLOCK = {
    "none": Option("Block", "", "the FFN reads what attention wrote"),
    "one_norm": Option("ParallelBlockOneNorm", "Parallel1", "attention and FFN side by side on one norm, as GPT-J"),
    "two_norms": Option("ParallelBlock", "Parallel2", "side by side, a norm each, as GPT-NeoX"),
}
ACTIVATION = {
    "gelu": Option("GELU", "GELU", "x * Phi(x), exact (Hendrycks & Gimpel 2016)"),
    "gelu_tanh": Option("GELUTanh", "GELUtanh", "the tanh approximation that the released GPT-2 uses"),
    "silu": Option("SiLU", "SiLU", "x * sigmoid(x)"),
    "relu": Option("ReLU", "ReLU", "max(x, 0)"),
    "relu2": Option("ReLU2", "ReLU2", "max(x, 0) squared (So 2021)"),
    "leaky_relu": Option("LeakyReLU", "LeakyReLU", "max(x, 0.01 x)"),
}
FFN_TYPE = {
    "standard": Option("StandardFFN", "", "down(activation(up(x))), d_ff = 4 n_embd", keys=("activation",)),
    "swiglu": Option("SwiGLU", "SwiGLU", "down(silu(gate(x)) * up(x)), d_ff = 8/3 n_embd (Shazeer 2020)",
                     implies=activations("silu")),
    "geglu": Option("GEGLU", "GEGLU", "the same with GELU, exact or tanh (Shazeer 2020; tanh: Gemma)",
                    keys=("activation",), implies=activations("gelu", "gelu_tanh")),
    "reglu": Option("ReGLU", "ReGLU", "the same with ReLU (Shazeer 2020)", implies=activations("relu")),
}
POSITION_ENCODING = {
    "learned_absolute": Option("LearnedAbsolutePositions", "AbsPos", "a trained vector for each position"),
    "sinusoidal": Option("SinusoidalPositions", "SinPos", "fixed waves added to the embedding (Vaswani 2017)"),
    "rope": Option("RotaryPositions", "RoPE", "queries and keys rotated by position (Su 2021)",
                   keys=("rope_theta", "rope_theta_local", "rope_fraction", "rope_scaling")),
    "alibi": Option("AlibiPositions", "ALiBi", "scores fall with distance, each head at its own rate (Press 2022)"),
    "none": Option("NoPositions", "NoPE", "causality is the only sense of order (Haviv 2022)"),
}
ROPE_SCALING = {
    "none": Option("NoScaling", "", "angles as they are"),
    "linear": Option("LinearScaling", "Linear", "all angles slower by the factor (Chen 2023)",
                     keys=("rope_scaling_factor",)),
    "llama3": Option("Llama3Scaling", "Llama3", "slow angles slower, fast ones kept, as Llama 3.1",
                     keys=("rope_scaling_factor", "rope_original_context")),
    "yarn": Option("YarnScaling", "YaRN", "by turns over the original context, and sharper scores (Peng 2023)",
                   keys=("rope_scaling_factor", "rope_original_context")),
}
ATTENTION_BACKEND = {  # `auto` takes the first that can do what is asked
    "sdpa": Option("SDPAttention", "", "torch's fused scaled_dot_product_attention", cannot=("attn_softcap",)),
    "manual": Option("ManualAttention", "", "softmax(q k^T) v written out: the readable reference"),
    "flex": Option("FlexAttention", "", "torch's flex_attention: masks and score changes compiled into one kernel",
                   cannot=("dropout",), trains_on=("cuda",)),
}
QK_NORM = {
    "none": Option("NoQKNorm", "", "queries and keys as they are"),
    "head": Option("QKNormPerHead", "QKNorm", "each head of them normalised, as Qwen3 and Gemma 3"),
    "projection": Option("QKNormProjection", "QKNormFull", "all heads of them normalised as one, as OLMo 2"),
}
ATTN_GATE = {
    "none": Option("NoGate", "", "what attention gathers goes to the output projection"),
    "elementwise": Option("ElementwiseGate", "Gated", "times sigmoid(gate(x)), a value each (Qiu 2025)"),
    "headwise": Option("HeadwiseGate", "GatedHead", "times sigmoid(gate(x)), one a head (Qiu 2025)"),
}
INIT = {
    "gpt2": Option("GPT2Init", "", "N(0, init_std), what writes to the residual stream / sqrt(2 n_layer)"),
    "normal": Option("NormalInit", "", "N(0, init_std) throughout"),
    "mup": Option("MuPInit", "muP", "gpt2's at mup_base_width; wider: weights, rates and logits scaled (Yang 2022)",
                  keys=("mup_base_width",)),
}
AXES = {
    "normalization": NORMALIZATION,
    "norm_position": NORM_POSITION,
    "parallel_block": PARALLEL_BLOCK,
    "activation": ACTIVATION,
    "ffn_type": FFN_TYPE,
    "position_encoding": POSITION_ENCODING,
    "rope_scaling": ROPE_SCALING,
    "attention_backend": ATTENTION_BACKEND,
    "qk_norm": QK_NORM,
    "attn_gate": ATTN_GATE,
    "init": INIT,
}
# Where the classes of an axis stand, if not in model_components.
ROOMS = {"attention_backend": "model_attention", "qk_norm": "model_attention", "attn_gate": "model_attention",
         "position_encoding": "model_positions", "rope_scaling": "model_positions", "init": "model_init",
         "parallel_block": "model_builder"}

# Presets name components, never sizes: sizes come from config/size_*.py or the command line.
PRESETS = {
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
               "its 1B, and have a RoPE base of their own.",
               dict(normalization="rmsnorm_gemma", norm_eps=1e-6, norm_position="sandwich", ffn_type="geglu",
                    activation="gelu_tanh", position_encoding="rope", rope_theta=1_000_000.0,
                    rope_theta_local=10_000.0, qk_norm="head", sliding_window=512, window_pattern="SSSSSL",
                    embedding_scale="sqrt", bias=False, weight_tying=True)),
    "olmo2": ("OLMo 2 (OLMo Team 2025): norms on the sublayers' outputs, queries and keys normalised whole.",
              dict(normalization="rmsnorm", norm_eps=1e-6, norm_position="reordered", ffn_type="swiglu",
                   position_encoding="rope", rope_theta=500_000.0, qk_norm="projection", bias=False,
                   weight_tying=False)),
    "neox": ("GPT-NeoX and Pythia (Black 2022, Biderman 2023): attention and FFN side by side, RoPE on a quarter of "
             "each head, biases.",
             dict(normalization="layernorm", norm_position="pre", parallel_block="two_norms", activation="gelu",
                  ffn_type="standard", position_encoding="rope", rope_fraction=0.25, bias=True, weight_tying=False)),
    "modern": ("The strongest small model that docs/BENCHMARKS.md found: LLaMA with a tied head and each head's "
               "queries and keys normalised.",
               dict(normalization="rmsnorm", norm_position="pre", ffn_type="swiglu", position_encoding="rope",
                    qk_norm="head", bias=False, weight_tying=True)),
    "team": ("model_v1: RoPE, RMSNorm, SwiGLU and pre-norm as LLaMA, with the head tied to the embedding.",
             dict(normalization="rmsnorm", norm_position="pre", ffn_type="swiglu",
                  position_encoding="rope", bias=False, weight_tying=True)),
    "hybrid": ("RoPE in a GPT-2 body: bias-free LayerNorm, GELU, pre-norm, tied head.",
               dict(normalization="layernorm_nobias", norm_position="pre", activation="gelu", ffn_type="standard",
                    position_encoding="rope", bias=False, weight_tying=True)),
    "custom": ("The default of every axis (nanoGPT's architecture), to be overridden one by one.", dict()),
}


def axis(name, default, help):
    return key(default, help, group="architecture", choices=AXES[name])


def divisors(n, at_most=256):
    return ", ".join(str(d) for d in range(1, min(n, at_most) + 1) if n % d == 0)


@dataclass(frozen=True)
class ModelConfig:
    """One transformer, described. `None` means "derived": `resolve()` fills it in; or "none of it", as its line says.

    The default sizes are GPT-2's 124M. Errors are `ConfigError`, naming the key.
    """

    arch_preset: str = key("custom", "named set of components; explicit keys beat it", group="architecture",
                           choices=PRESETS)
    normalization: str = axis("normalization", "layernorm_nobias", "norm of the residual stream")
    norm_eps: float = key(1e-5, "added to the variance before the root", group="architecture", above=0.0)
    norm_position: str = axis("norm_position", "pre", "where the norm stands around attention and FFN")
    parallel_block: str = axis("parallel_block", "none", "attention and FFN one after the other, or side by side")
    activation: str | None = key(None, "inside the FFN; None: gelu, or what a gated FFN brings with it",
                                 group="architecture", choices=AXES["activation"])
    ffn_type: str = axis("ffn_type", "standard", "feed-forward network")
    d_ff: int | None = key(None, "FFN width; None: 4 n_embd, or 8/3 n_embd where gated, rounded up to ffn_multiple_of",
                           group="architecture", minimum=1, maximum=100_000_000, label="FF{}")
    ffn_multiple_of: int | None = key(None, "what a derived d_ff is rounded up to; None: 64 where gated, else 1",
                                      group="architecture", minimum=1, maximum=1_000_000)
    position_encoding: str = axis("position_encoding", "learned_absolute", "how tokens know their place")
    rope_theta: float = key(10000.0, "base of RoPE's wavelengths", group="architecture", above=1.0, label="theta{:g}")
    rope_theta_local: float | None = key(None, "the base in layers with a window, unscaled; None: as the others",
                                         group="architecture", above=1.0, label="local{:g}")
    rope_fraction: float = key(1.0, "part of each head that RoPE turns", group="architecture", above=0.0, maximum=1.0,
                               label="rot{:g}")
    rope_scaling: str = axis("rope_scaling", "none", "RoPE for a longer context than it was trained on")
    rope_scaling_factor: float = key(8.0, "how many times longer", group="architecture", minimum=1.0, label="x{:g}")
    rope_original_context: int | None = key(None, "context before; None: block_size / rope_scaling_factor",
                                            group="architecture", minimum=1)
    attention_backend: str = key("auto", "implementation of attention, same mathematics; auto: the first that can do "
                                 "what is asked", group="architecture", choices=("auto", *ATTENTION_BACKEND))
    qk_norm: str = axis("qk_norm", "none", "norm of queries and keys, of the kind of the others")
    attn_gate: str = axis("attn_gate", "none", "gate on what attention gathers")
    attn_scale: float | None = key(None, "of q k^T; None: 1 / sqrt(head_dim), with init=mup 1 / head_dim",
                                   group="architecture", above=0.0, label="scale{:g}")
    attn_softcap: float | None = key(None, "c tanh(scores / c); None: no cap", group="architecture", above=0.0,
                                     label="cap{:g}")
    logit_softcap: float | None = key(None, "c tanh(logits / c); None: no cap", group="architecture", above=0.0,
                                      label="logitcap{:g}")
    sliding_window: int | None = key(None, "tokens that a windowed layer sees, itself included; None: no windows",
                                     group="architecture", minimum=1, label="SW{}")
    window_pattern: str = key("S", "S: a layer with the window, L: without; repeated over the layers",
                              group="architecture", label="{}")
    causal: bool = key(True, "tokens see no later ones; False is for objectives other than next-token prediction",
                       group="architecture", label="NonCausal")
    mask_documents: bool = key(False, "tokens see their own document alone", group="architecture", label="DocMask")
    bias: bool = key(False, "biases in the linear layers of attention and FFN", group="architecture", label="Bias")
    qkv_bias: bool | None = key(None, "biases of queries, keys and values; None: as bias", group="architecture")
    weight_tying: bool = key(True, "output head shares the token embedding's weights", group="architecture")
    embedding_scale: float | str = key(1.0, "factor on token embeddings; sqrt: sqrt(n_embd)", group="architecture",
                                       above=0.0, label="emb{}")
    embedding_norm: bool = key(False, "norm on the embeddings", group="architecture", label="EmbNorm")
    residual_scale: float = key(1.0, "factor on what a sublayer adds to the stream", group="architecture", above=0.0,
                                label="res{:g}")
    x0_mix: bool = key(False, "each block mixes the embeddings back in, by trained weights (modded-nanogpt)",
                       group="architecture", label="X0")
    value_embeddings: int = key(0, "tables of token embeddings added to the values of the first and, in reverse, the "
                                "last layers (modded-nanogpt)", group="architecture", minimum=0, label="VE{}")
    dropout: float = key(0.0, "on embeddings, attention weights and sublayer outputs", group="architecture",
                         minimum=0.0, below=1.0)
    init: str = axis("init", "gpt2", "how weights start")
    init_std: float = key(0.02, "standard deviation of weights at the start", group="architecture", minimum=0.0)
    zero_init_residual: bool = key(False, "projections that write to the residual stream start at 0",
                                   group="architecture", label="Zero")
    mup_base_width: int = key(256, "n_embd at which the learning rate was tuned", group="architecture", minimum=1,
                              maximum=1_000_000)
    # The largest sizes are beyond every machine: a slip of the finger, on which torch would fail or hang far from here.
    n_layer: int = key(12, "blocks", group="size", minimum=1, maximum=10_000)
    n_head: int = key(12, "query heads", group="size", minimum=1, maximum=100_000)
    n_kv_head: int | None = key(None, "key/value heads; None: n_head; fewer: grouped-query attention",
                                group="size", minimum=1)
    n_embd: int = key(768, "width of the residual stream", group="size", minimum=1, maximum=1_000_000)
    head_dim: int | None = key(None, "width of a head; None: n_embd / n_head", group="size", minimum=1,
                               maximum=1_000_000, label="HD{}")
    block_size: int = key(1024, "tokens of context", group="size", minimum=1, maximum=100_000_000)
    vocab_size: int = key(50257, "rows of the embedding; if not set, a run takes its dataset's, rounded up to 64",
                          group="size", minimum=1, maximum=2**32)

    def __post_init__(self):
        check_fields(self)
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ConfigError("n_head", f"{self.n_head} does not divide n_embd={self.n_embd} "
                                        f"(one of {divisors(self.n_embd)}; or set head_dim)")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise ConfigError("n_kv_head", f"{self.n_kv_head} does not divide n_head={self.n_head} "
                                           f"(one of {divisors(self.n_head)})")
        if self.position_encoding == "rope" and (self.rotary_dim() % 2 or not self.rotary_dim()):
            width = f"head_dim={self.head_dim}" if self.head_dim else f"n_embd={self.n_embd} / n_head={self.n_head}"
            part = f" × rope_fraction={self.rope_fraction:g}" if self.rope_fraction != 1 else ""
            raise ConfigError("position_encoding", "rope rotates pairs and needs an even head width, not "
                                                   f"{width}{part} (change that, or the position_encoding)")
        for name, values in self.implied().items():
            if getattr(self, name) not in (None, *values):
                raise self.incompatible_key(name)
        if isinstance(self.embedding_scale, str) and self.embedding_scale != "sqrt":
            raise ConfigError("embedding_scale", f"{short_repr(self.embedding_scale)} is unknown (a number, or sqrt)")
        if not set(self.window_pattern) <= set("SL"):
            raise ConfigError("window_pattern", f"{short_repr(self.window_pattern)} has other letters than S (a layer with "
                                                "the sliding_window) and L (one without)")
        if self.parallel_block == "two_norms" and self.norm_position == "post":
            raise ConfigError("parallel_block", "two_norms has no place in norm_position=post, which normalises the "
                                                "sum, once (one_norm, or another norm_position)")
        if 2 * self.value_embeddings > self.n_layer:
            raise ConfigError("value_embeddings", f"{self.value_embeddings} tables, each for one of the first and one "
                              f"of the last layers, are too many for n_layer={self.n_layer} (at most "
                              f"{self.n_layer // 2})")
        able, asked = self.supported_backends(), self.attention_backend
        if asked not in ("auto", *able):
            name = next(k for k in ATTENTION_BACKEND[asked].cannot if getattr(self, k))
            raise ConfigError("attention_backend", f"{asked} cannot do {name}={getattr(self, name):g} "
                                                   f"({' or '.join(able)} can, and auto finds it)")

    def flat(self):
        """{key: value}, as the run log keeps it."""
        return dataclasses.asdict(self)

    def supported_backends(self):
        """The attention backends that can do what is asked."""
        return [name for name, o in ATTENTION_BACKEND.items() if not any(getattr(self, k) for k in o.cannot)]

    def check_trainable_on(self, device_type):
        """`ConfigError` if the attention backend has no backward pass on such a device."""
        trains_on = self.options()["attention_backend"].trains_on
        if trains_on and device_type not in trains_on:
            able = [name for name in self.supported_backends() if not ATTENTION_BACKEND[name].trains_on]
            raise ConfigError("attention_backend", f"{self.attention_backend!r} has no backward pass on {device_type}: it "
                              f"trains on {' or '.join(trains_on)} ({' or '.join(able)} can here)")

    def rotary_dim(self):
        """Width of the part of a head that RoPE turns."""
        return int((self.head_dim or self.n_embd // self.n_head) * self.rope_fraction)

    def window(self, layer):
        """Tokens that layer number `layer` (from 0) sees, itself included; None: all of its context."""
        kind = self.window_pattern[layer % len(self.window_pattern)]
        return self.sliding_window if kind == "S" else None

    def value_table(self, layer):
        """The number of the table of value embeddings that layer number `layer` reads, or None."""
        from_the_end = self.n_layer - 1 - layer
        return next((i for i in (layer, from_the_end) if i < self.value_embeddings), None)

    def derived(self):
        """{key: what None (or auto) stands for} of the keys that follow from others."""
        gated = "activation" in FFN_TYPE[self.ffn_type].implies
        multiple = self.ffn_multiple_of or (64 if gated else 1)
        width = 8 * self.n_embd if gated else 12 * self.n_embd  # in thirds
        context = max(1, int(self.block_size / self.rope_scaling_factor))
        stretched = "rope_original_context" in ROPE_SCALING[self.rope_scaling].keys
        return {
            **({"rope_original_context": context} if stretched else {}),
            "n_kv_head": self.n_head,
            "head_dim": self.n_embd // self.n_head,
            "activation": self.implied().get("activation", ("gelu",))[0],
            "ffn_multiple_of": multiple,
            "d_ff": -(-width // (3 * multiple)) * multiple,
            "qkv_bias": self.bias,
            "attention_backend": next(iter(self.supported_backends())),
        }

    def resolve(self):
        """The same model with every derived key filled in; what `build_model` builds and the log records."""
        open_ = {k: v for k, v in self.derived().items() if getattr(self, k) in (None, "auto")}
        return dataclasses.replace(self, **open_)

    def options(self):
        """{axis: Option} of the choices in force."""
        full = self.resolve()
        return {name: table[getattr(full, name)] for name, table in AXES.items()}

    def implied(self):
        """{key: values it may have} by the chosen components themselves (SwiGLU's activation is SiLU)."""
        return {k: v for name in AXES for k, v in (self.option(name).implies.items() if self.option(name) else ())}

    def option(self, name):
        """The `Option` of axis `name`, or None where the choice is left to be derived."""
        return AXES[name].get(getattr(self, name))

    def incompatible_key(self, name):
        """The `ConfigError` for an explicit `name` beside a component that brings its own."""
        return ConfigError(name, f"{getattr(self, name)!r} has no place in ffn_type={self.ffn_type}, which brings its "
                                 f"own ({' or '.join(self.implied()[name])}): drop {name}, set it to None, or use "
                                 "ffn_type=standard")

    def unused_keys(self):
        """{key: reason} of the keys that nothing built from this config reads."""
        unused = {}
        for name, table in AXES.items():
            chosen = self.option(name)
            for k in {k for entry in table.values() for k in entry.keys}:
                if name in unused:
                    unused[k] = unused[name]
                elif chosen and k not in chosen.keys and k not in chosen.implies:
                    readers = " or ".join(o for o, e in table.items() if k in e.keys)
                    unused[k] = f"only {name}={readers} reads it, and this is {getattr(self, name)}"
        windows = {self.window(layer) for layer in range(self.n_layer)}
        if self.sliding_window is None:
            unused["window_pattern"] = "sliding_window is not set"
        elif windows == {None}:
            unused["sliding_window"] = f"window_pattern={self.window_pattern} gives it to none of the layers"
        if windows == {None}:
            unused.setdefault("rope_theta_local", "no layer has a window")
        elif None not in windows and self.rope_theta_local is not None:
            unused |= dict.fromkeys(("rope_theta", "rope_scaling", "rope_scaling_factor", "rope_original_context"),
                                    "every layer has a window, and rope_theta_local is theirs")
        if self.d_ff is not None:
            unused["ffn_multiple_of"] = "d_ff is set"
        return unused

    def arch_name(self):
        """Size and components on one line, e.g. 12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm.

        What departs from the usual is added, in the order of the keys: options with a label, then values.
        """
        o, full, usual = self.options(), self.resolve(), self.derived()
        heads = f"{self.n_head}H" if full.n_kv_head == self.n_head else f"{self.n_head}H{full.n_kv_head}KV"
        ffn = [o["ffn_type"].label] if o["ffn_type"].label else []
        ffn += [] if ffn and full.activation == usual["activation"] else [o["activation"].label]
        parts = [f"{self.n_layer}L", heads, f"{self.n_embd}D", o["position_encoding"].label, o["normalization"].label,
                 *ffn, o["norm_position"].label]
        told = ("position_encoding", "normalization", "ffn_type", "activation", "norm_position")
        unused = self.unused_keys()
        for f in dataclasses.fields(self):
            value, label = getattr(full, f.name), f.metadata["label"]
            if f.name in unused or f.name in told:
                continue
            if f.name in AXES:
                parts += [o[f.name].label] if o[f.name].label else []
            elif label and value != usual.get(f.name, f.default):
                parts.append(label.format(value))
        return "-".join(parts)


def apply_preset(overrides):
    """ModelConfig from explicit keys over the preset that they name (`arch_preset`), over the defaults."""
    name = overrides.get("arch_preset", "custom")
    if name not in PRESETS:
        raise ConfigError("arch_preset", f"{short_repr(name)} is unknown{did_you_mean(name, PRESETS)}")
    components = dict(PRESETS[name][1])
    ffn = overrides.get("ffn_type", components.get("ffn_type"))
    if ffn in FFN_TYPE:  # a preset's activation does not follow into an FFN that brings its own
        for k, values in FFN_TYPE[ffn].implies.items():
            if components.get(k) not in values:
                components.pop(k, None)
    return ModelConfig(**{**components, **overrides})


def get_preset(name, **overrides):
    """The preset `name` with `overrides` on top; sizes are GPT-2's 124M unless overridden."""
    return apply_preset({**overrides, "arch_preset": name})


def list_presets():
    """Print each preset: its name, what it is, its components."""
    for name, (summary, _) in PRESETS.items():
        c = get_preset(name)
        o = c.options()
        print(textwrap.fill(summary, 118, initial_indent=f"{name:12} ", subsequent_indent=" " * 13))
        print(f"{'':12} {o['position_encoding'].label} · {o['normalization'].label} (eps {c.norm_eps:g}) · "
              f"{o['ffn_type'].label or o['activation'].label} · {o['norm_position'].label} · "
              f"bias {'yes' if c.bias else 'no'} · head {'tied' if c.weight_tying else 'untied'}")
        print(f"{'':12} {c.arch_name()}\n")
