"""Every architecture choice as plain data: what can be chosen, what it is called, what fits together.

Each axis table maps an option to the name of its class in `model_components.py`, its label in the
architecture name and a line of help. A new component is one class there and one line here; nothing
else in the project lists the options. Torch is never imported: configs are read, checked, listed
and compared without it.
"""

import dataclasses
import operator
import types
import typing
from dataclasses import dataclass, field

from errors import ConfigError, did_you_mean, shown


class Option(typing.NamedTuple):
    """One value of an axis. `keys` are the configuration keys that only this option reads."""

    cls: str
    label: str
    help: str
    keys: tuple = ()
    implies: types.MappingProxyType = types.MappingProxyType({})  # keys whose value the option itself fixes


NORMALIZATION = {
    "layernorm": Option("LayerNorm", "LN", "mean and variance, scale and shift (Ba 2016)"),
    "layernorm_nobias": Option("LayerNormNoBias", "LN-NB", "mean and variance, scale only"),
    "rmsnorm": Option("RMSNorm", "RMS", "root mean square, scale only (Zhang & Sennrich 2019)"),
}
NORM_POSITION = {
    "pre": Option("PreNorm", "PreNorm", "x + f(norm(x)); one more norm before the head"),
    "post": Option("PostNorm", "PostNorm", "norm(x + f(x)), as the 2017 Transformer"),
}
ACTIVATION = {
    "gelu": Option("GELU", "GELU", "x * Phi(x), exact (Hendrycks & Gimpel 2016)"),
    "gelu_tanh": Option("GELUTanh", "GELUtanh", "the tanh approximation that the released GPT-2 uses"),
    "silu": Option("SiLU", "SiLU", "x * sigmoid(x)"),
    "relu": Option("ReLU", "ReLU", "max(x, 0)"),
    "leaky_relu": Option("LeakyReLU", "LeakyReLU", "max(x, 0.01 x)"),
}
FFN_TYPE = {
    "standard": Option("StandardFFN", "", "down(activation(up(x))), d_ff = 4 n_embd", keys=("activation",)),
    "swiglu": Option("SwiGLU", "SwiGLU", "down(silu(gate(x)) * up(x)), d_ff = 8/3 n_embd (Shazeer 2020)",
                     implies=types.MappingProxyType({"activation": "silu"})),
}
POSITION_ENCODING = {
    "learned_absolute": Option("LearnedAbsolutePositions", "AbsPos", "a trained vector for each position"),
    "rope": Option("RotaryPositions", "RoPE", "queries and keys rotated by position (Su 2021)",
                   keys=("rope_theta",)),
    "none": Option("NoPositions", "NoPE", "causality is the only sense of order (Haviv 2022)"),
}
ATTENTION_BACKEND = {
    "sdpa": Option("SDPAttention", "", "torch's fused scaled_dot_product_attention"),
    "manual": Option("ManualAttention", "", "softmax(q k^T) v written out: the readable reference"),
}
AXES = {
    "normalization": NORMALIZATION,
    "norm_position": NORM_POSITION,
    "activation": ACTIVATION,
    "ffn_type": FFN_TYPE,
    "position_encoding": POSITION_ENCODING,
    "attention_backend": ATTENTION_BACKEND,
}

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
    "team": ("model_v1: RoPE, RMSNorm, SwiGLU and pre-norm as LLaMA, with the head tied to the embedding.",
             dict(normalization="rmsnorm", norm_position="pre", ffn_type="swiglu",
                  position_encoding="rope", bias=False, weight_tying=True)),
    "hybrid": ("RoPE in a GPT-2 body: bias-free LayerNorm, GELU, pre-norm, tied head.",
               dict(normalization="layernorm_nobias", norm_position="pre", activation="gelu", ffn_type="standard",
                    position_encoding="rope", bias=False, weight_tying=True)),
    "custom": ("The default of every axis (nanoGPT's architecture), to be overridden one by one.", dict()),
}


def key(default, help, *, group, minimum=None, above=None, maximum=None, below=None, choices=None):
    """A dataclass field that is a configuration key: its default, its line of help, its legal range.

    minimum / maximum are inclusive bounds, above / below exclusive; choices lists the legal values.
    """
    metadata = dict(help=help, group=group, minimum=minimum, above=above, maximum=maximum, below=below,
                    choices=tuple(choices) if choices else None)
    return field(default=default, metadata=metadata)


def key_types(cls):
    """{key: the types that its value may have} of a dataclass of keys."""
    hints = typing.get_type_hints(cls)
    return {f.name: typing.get_args(hints[f.name]) or (hints[f.name],) for f in dataclasses.fields(cls) if f.metadata}


def check_fields(config):
    """Raise `ConfigError` for the first key of `config` whose value has the wrong type, range or choice."""
    accepted = key_types(type(config))
    for f in dataclasses.fields(config):
        if f.metadata:
            check_value(f, accepted[f.name], getattr(config, f.name))


def check_value(f, accepted, value):
    """Raise `ConfigError` if the key with dataclass field `f` and the types `accepted` cannot have `value`."""
    if value is None and type(None) in accepted:
        return
    if type(value) not in accepted and not (type(value) is int and float in accepted):
        names = " or ".join("None" if t is type(None) else t.__name__ for t in accepted)
        raise ConfigError(f.name, f"{shown(value)} is {type(value).__name__}, not {names}")
    limits = f.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(f.name, f"{shown(value)} is unknown{did_you_mean(value, limits['choices'])}")
    if isinstance(value, str):
        if not value or not value.isprintable():
            raise ConfigError(f.name, f"{shown(value)} has characters that cannot be printed" if value else "is empty")
        return
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f.name, f"{value} is not a finite number")
    for bound, outside, words in BOUNDS:
        limit = LARGEST if limits[bound] is None and bound == "maximum" and type(value) is int else limits[bound]
        if limit is not None and outside(value, limit):
            raise ConfigError(f.name, f"{shown(value)} is out of range, must be {words} {limit}")


LARGEST = 2**63 - 1  # numpy and torch know no larger integer
BOUNDS = (("minimum", operator.lt, "at least"), ("above", operator.le, "above"),
          ("maximum", operator.gt, "at most"), ("below", operator.ge, "below"))


def axis(name, default, help):
    return key(default, help, group="architecture", choices=AXES[name])


def divisors(n, at_most=256):
    return ", ".join(str(d) for d in range(1, min(n, at_most) + 1) if n % d == 0)


@dataclass(frozen=True)
class ModelConfig:
    """One transformer, described. `None` means "derived": `resolve()` fills it in.

    The default sizes are GPT-2's 124M. Errors are `ConfigError`, naming the key.
    """

    arch_preset: str = key("custom", "named set of components; explicit keys beat it", group="architecture",
                           choices=PRESETS)
    normalization: str = axis("normalization", "layernorm_nobias", "norm of the residual stream")
    norm_eps: float = key(1e-5, "added to the variance before the root", group="architecture", above=0.0)
    norm_position: str = axis("norm_position", "pre", "where the norm stands around attention and FFN")
    activation: str | None = key(None, "inside the standard FFN; None: gelu there, SwiGLU brings its own",
                                 group="architecture", choices=AXES["activation"])
    ffn_type: str = axis("ffn_type", "standard", "feed-forward network")
    d_ff: int | None = key(None, "FFN width; None: 4 n_embd, or 8/3 n_embd rounded up to 64 where gated",
                           group="architecture", minimum=1, maximum=100_000_000)
    position_encoding: str = axis("position_encoding", "learned_absolute", "how tokens know their place")
    rope_theta: float = key(10000.0, "base of RoPE's wavelengths", group="architecture", above=0.0)
    attention_backend: str = axis("attention_backend", "sdpa", "implementation of attention, same mathematics")
    bias: bool = key(False, "biases in the linear layers of attention and FFN", group="architecture")
    weight_tying: bool = key(True, "output head shares the token embedding's weights", group="architecture")
    dropout: float = key(0.0, "on embeddings, attention weights and sublayer outputs", group="architecture",
                         minimum=0.0, below=1.0)
    init_std: float = key(0.02, "of weights at the start; residual projections: / sqrt(2 n_layer)",
                          group="architecture", minimum=0.0)
    # The largest sizes are beyond every machine: a slip of the finger, on which torch would fail or hang far from here.
    n_layer: int = key(12, "blocks", group="size", minimum=1, maximum=10_000)
    n_head: int = key(12, "query heads", group="size", minimum=1, maximum=100_000)
    n_kv_head: int | None = key(None, "key/value heads; None: n_head; fewer: grouped-query attention",
                                group="size", minimum=1)
    n_embd: int = key(768, "width of the residual stream", group="size", minimum=1, maximum=1_000_000)
    head_dim: int | None = key(None, "width of a head; None: n_embd / n_head", group="size", minimum=1,
                               maximum=1_000_000)
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
        if self.position_encoding == "rope" and (self.head_dim or self.n_embd // self.n_head) % 2:
            width = f"head_dim={self.head_dim}" if self.head_dim else f"n_embd={self.n_embd} / n_head={self.n_head}"
            raise ConfigError("position_encoding", f"rope rotates pairs and needs an even head width, not {width} "
                                                   "(change that, or the position_encoding)")
        for name, value in self.implied().items():
            if getattr(self, name) not in (None, value):
                raise self.no_place_for(name)

    def flat(self):
        """{key: value}, as the run log keeps it."""
        return dataclasses.asdict(self)

    def options(self):
        """{axis: Option} of the choices in force."""
        chosen = {name: getattr(self, name) for name in AXES}
        chosen["activation"] = chosen["activation"] or self.implied().get("activation", "gelu")
        return {name: AXES[name][value] for name, value in chosen.items()}

    def implied(self):
        """{key: value} that the chosen components fix by themselves (SwiGLU's activation is SiLU)."""
        return {k: v for name in AXES if getattr(self, name)
                for k, v in AXES[name][getattr(self, name)].implies.items()}

    def no_place_for(self, name):
        """The `ConfigError` for an explicit `name` beside a component that brings its own."""
        return ConfigError(name, f"{getattr(self, name)!r} has no place in ffn_type={self.ffn_type}, which brings its "
                                 f"own ({self.implied()[name]}): drop {name}, set it to None, or use ffn_type=standard")

    def resolve(self):
        """The same model with every derived key filled in; what `build_model` builds and the log records."""
        gated = "activation" in FFN_TYPE[self.ffn_type].implies
        d_ff = -(-8 * self.n_embd // (3 * 64)) * 64 if gated else 4 * self.n_embd
        return dataclasses.replace(
            self,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            activation=self.activation or self.implied().get("activation", "gelu"),
            d_ff=self.d_ff or d_ff,
        )

    def unused_keys(self):
        """{key: reason} of the keys that no chosen component reads."""
        unused = {}
        for name, table in AXES.items():
            chosen = table[getattr(self, name)] if getattr(self, name) else None
            for option, entry in table.items():
                for k in entry.keys:
                    if chosen and k not in chosen.keys and k not in chosen.implies:
                        unused[k] = f"only {name}={option} reads it, and this is {getattr(self, name)}"
        return unused

    def arch_name(self):
        """Size and components on one line, e.g. 12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm.

        What departs from the usual is added: key/value heads, biases, an FFN or head width of its own.
        """
        o, full = self.options(), self.resolve()
        heads = f"{self.n_head}H" if full.n_kv_head == self.n_head else f"{self.n_head}H{full.n_kv_head}KV"
        parts = [f"{self.n_layer}L", heads, f"{self.n_embd}D", o["position_encoding"].label, o["normalization"].label,
                 o["ffn_type"].label or o["activation"].label, o["norm_position"].label]
        parts += [f"FF{full.d_ff}"] if full.d_ff != dataclasses.replace(self, d_ff=None).resolve().d_ff else []
        parts += [f"HD{full.head_dim}"] if full.head_dim * self.n_head != self.n_embd else []
        parts += ["Bias"] if self.bias else []
        return "-".join(parts)


def apply_preset(overrides):
    """ModelConfig from explicit keys over the preset that they name (`arch_preset`), over the defaults."""
    name = overrides.get("arch_preset", "custom")
    if name not in PRESETS:
        raise ConfigError("arch_preset", f"{shown(name)} is unknown{did_you_mean(name, PRESETS)}")
    components = dict(PRESETS[name][1])
    ffn = overrides.get("ffn_type", components.get("ffn_type"))
    if ffn in FFN_TYPE:  # a preset's activation does not follow into an FFN that brings its own
        for k in FFN_TYPE[ffn].implies:
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
        print(f"{name:12} {summary}")
        print(f"{'':12} {o['position_encoding'].label} · {o['normalization'].label} (eps {c.norm_eps:g}) · "
              f"{o['ffn_type'].label or o['activation'].label} · {o['norm_position'].label} · "
              f"bias {'yes' if c.bias else 'no'} · head {'tied' if c.weight_tying else 'untied'}")
        print(f"{'':12} {c.arch_name()}\n")
