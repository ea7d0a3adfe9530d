"""The families of transformers that a model here can be: one table of rules each.

To add a family: a `Family` in FAMILIES. tests/huggingface/ then asks for tiny checkpoints of it, and breaks each of its
rules in turn. Defaults are those of transformers' configuration class, where a config.json does not have the key.
"""

import math
from collections.abc import Mapping
from typing import Any

from blockgpt.errors import short_repr
from blockgpt.huggingface.rules import (
    SAME,
    Family,
    Grouped,
    Interleaved,
    KeyRule,
    Keys,
    Rows,
    Stacked,
    StackedTransposed,
    TensorRule,
    Transposed,
    Unsupported,
    choice,
    converted,
    derived,
    off,
    options,
    required,
    same,
)

# ---------------------------------------------------------------- keys that several families have

# {value of hidden_act: keys here}. "gelu_new" and "gelu_pytorch_tanh" are the same function; "gelu_fast" is it, too,
# with ten digits of sqrt(2 / pi).
GATED = {"silu": dict(ffn_type="swiglu", activation="silu"), "swish": dict(ffn_type="swiglu", activation="silu"),
         "gelu_pytorch_tanh": dict(ffn_type="geglu", activation="gelu_tanh"),
         "gelu_new": dict(ffn_type="geglu", activation="gelu_tanh"),
         "gelu": dict(ffn_type="geglu", activation="gelu"), "relu": dict(ffn_type="reglu", activation="relu")}
PLAIN = {name: dict(ffn_type="standard", activation=activation) for name, activation in {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "leaky_relu": "leaky_relu"}.items()}


def sizes(context: int, vocabulary: int, width: int, ffn: int, layers: int, heads: int) -> tuple[KeyRule, ...]:
    """The sizes under the names that most families use, with their defaults."""
    return (same("vocab_size", "vocab_size", vocabulary), same("hidden_size", "n_embd", width),
            same("intermediate_size", "d_ff", ffn), same("num_hidden_layers", "n_layer", layers),
            same("num_attention_heads", "n_head", heads), same("max_position_embeddings", "block_size", context))


def kv_heads(default: int | None) -> KeyRule:
    return derived("num_key_value_heads", "n_kv_head", default, lambda t: t["num_attention_heads"])


def head_dim(default: int | None = None) -> KeyRule:
    """The key head_dim, for families that have it."""
    return derived("head_dim", "head_dim", default, lambda t: t["hidden_size"] // t["num_attention_heads"])


def tied(default: bool) -> KeyRule:
    return same("tie_word_embeddings", "weight_tying", default)


def biases(ffn: str | None) -> KeyRule:
    """attention_bias, and the key `ffn` of the FFN's biases; None: it has none."""
    def read(t: Keys) -> dict[str, Any]:
        attention, outputs = bool(t["attention_bias"]), bool(ffn and t[ffn])
        if attention != outputs:
            raise Unsupported(f"attention_bias: {attention} with {'biases' if outputs else 'no biases'} in the FFN is "
                              "not supported (the key bias is of both)")
        return {"bias": attention, "qkv_bias": attention}

    def write(o: Keys) -> dict[str, Any]:
        return {"attention_bias": o["bias"], **({ffn: o["bias"]} if ffn else {})}

    return KeyRule({"attention_bias": False, **({ffn: False} if ffn else {})}, read, write)


# ---------------------------------------------------------------- RoPE

YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # the values that YarnScaling has
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # … and Llama3Scaling


def scaling_keys(parameters: Keys, context: int) -> dict[str, Any]:
    """The keys here of what transformers 4 calls rope_scaling, transformers 5 rope_parameters; theta is not among them.

    Args:
        parameters: {"rope_type": …, "factor": …, …}.
        context: max_position_embeddings, the original context where none is given.
    """
    left = {k: v for k, v in parameters.items() if v is not None and k not in (
        "rope_type", "type", "rope_theta", "partial_rotary_factor")}
    name = parameters.get("rope_type", parameters.get("type")) or "default"
    if name == "default":
        return {"rope_scaling": "none"}
    if name not in ("linear", "llama3", "yarn"):
        raise Unsupported(f"rope_scaling: {short_repr(name)} is not supported (only default, linear, llama3, yarn)")
    scale = float(left.pop("factor"))
    keys: dict[str, Any] = {"rope_scaling": name, "rope_scaling_factor": scale}
    original = left.pop("original_max_position_embeddings", None)
    if name != "linear":
        keys["rope_original_context"] = original or context
    if name == "yarn":
        factor, expected = left.pop("attention_factor", None), 0.1 * math.log(scale) + 1.0
        if factor is not None and abs(factor - expected) > 1e-9:
            raise Unsupported(f"rope_scaling: attention_factor {factor} is not supported (only 0.1 ln(factor) + 1)")
    for key, value in (YARN if name == "yarn" else LLAMA3 if name == "llama3" else {}).items():
        if left.pop(key, value) != value:
            raise Unsupported(f"rope_scaling: {key} is not {value:g}, the only value that is supported")
    if left:
        raise Unsupported(f"rope_scaling: {options(sorted(left))} is not supported for {name}")
    return keys


def number_of(parameters: Keys, name: str, default: Any) -> float:
    """A value of rope_parameters; `default` where it is missing or None."""
    value = parameters.get(name)
    return float(default if value is None else value)


def scaling_parameters(o: Keys) -> dict[str, Any] | None:
    """rope_scaling of config.json; None without scaling."""
    if o["rope_scaling"] == "none":
        return None
    parameters = {"rope_type": o["rope_scaling"], "factor": o["rope_scaling_factor"]}
    if o["rope_scaling"] != "linear":
        parameters["original_max_position_embeddings"] = o["rope_original_context"]
    return parameters | (LLAMA3 if o["rope_scaling"] == "llama3" else {})


def rope(theta: float = 10000.0, fraction: float | None = None, names: tuple[str, str] = (
        "rope_theta", "partial_rotary_factor"), outer_context: int | None = None) -> KeyRule:
    """RoPE with one base for all layers.

    Written are the keys of transformers 4, which transformers 5, vLLM and llama.cpp read too.

    Args:
        theta: the default base.
        fraction: the default of the rotated fraction; None: the family rotates whole heads.
        names: the keys of base and fraction outside rope_parameters.
        outer_context: the default of the key original_max_position_embeddings, of Phi 3, whose class in transformers
            takes no scaling but longrope; None: the family has none.
    """
    theta_name, fraction_name = names

    def read(t: Keys) -> dict[str, Any]:
        parameters: dict[str, Any] = t["rope_scaling"] or t["rope_parameters"] or {}
        keys = {"rope_theta": number_of(parameters, "rope_theta", t[theta_name])}
        if fraction is not None:
            keys["rope_fraction"] = number_of(parameters, "partial_rotary_factor", t[fraction_name])
        elif parameters.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise Unsupported("partial_rotary_factor: this family rotates whole heads")
        scaling = scaling_keys(parameters, t["max_position_embeddings"])
        if outer_context and scaling["rope_scaling"] != "none":
            raise Unsupported(f"rope_scaling: {scaling['rope_scaling']} is not supported for this family")
        return keys | scaling

    def write(o: Keys) -> dict[str, Any]:
        return {theta_name: o["rope_theta"], "rope_scaling": scaling_parameters(o),
                **({} if fraction is None else {fraction_name: o["rope_fraction"]}),
                **({"original_max_position_embeddings": o["block_size"]} if outer_context else {})}

    return KeyRule({theta_name: theta, "rope_scaling": None, "rope_parameters": None,
                    **({} if fraction is None else {fraction_name: fraction}),
                    **({"original_max_position_embeddings": outer_context} if outer_context else {})}, read, write)


def rope_by_layer(theta: float, local: float | None) -> KeyRule:
    """RoPE whose layers with a window have their own base, unscaled.

    Args:
        theta: the default base of the other layers.
        local: the default base of those with a window; None: rope_theta.
    """
    def read(t: Keys) -> dict[str, Any]:
        by_layer: dict[str, Any] = t["rope_parameters"] or {}
        if by_layer and not by_layer.keys() <= {"full_attention", "sliding_attention"}:  # one for all layers
            by_layer = {"full_attention": by_layer, "sliding_attention": by_layer}
        full: dict[str, Any] = {**(by_layer.get("full_attention") or {}), **(t["rope_scaling"] or {})}
        window: dict[str, Any] = by_layer.get("sliding_attention") or {}
        keys = {"rope_theta": number_of(full, "rope_theta", t["rope_theta"]),
                **scaling_keys(full, t["max_position_embeddings"])}
        default = t["rope_theta"] if local is None else t["rope_local_base_freq"]
        keys["rope_theta_local"] = number_of(window, "rope_theta", default)
        in_window = scaling_keys(window, t["max_position_embeddings"])
        if in_window["rope_scaling"] != "none":
            raise Unsupported("rope_parameters: a scaling of the layers with a window is not supported")
        return keys

    def write(o: Keys) -> dict[str, Any]:
        theta, scaling = o["rope_theta"], scaling_parameters(o)
        base = theta if o["rope_theta_local"] is None else o["rope_theta_local"]
        keys = {"rope_theta": theta, "rope_scaling": scaling}
        if local is not None:
            return keys | {"rope_local_base_freq": base}
        default = {"rope_type": "default"}  # transformers 5 gives layers with a window another base than rope_theta
        return keys | {"rope_parameters": {"full_attention": {**(scaling or default), "rope_theta": theta},
                                           "sliding_attention": {**default, "rope_theta": base}}}

    return KeyRule({"rope_theta": theta, "rope_scaling": None, "rope_parameters": None,
                    **({} if local is None else {"rope_local_base_freq": local})}, read, write)


# ---------------------------------------------------------------- windows


def shortest_pattern(letters: str) -> str:
    """The shortest string whose repetition begins with `letters`."""
    total = len(letters)
    return next(letters[:n] for n in range(1, total + 1) if (letters[:n] * total)[:total] == letters)


def window(default: int | None) -> KeyRule:
    """The same window, or none, in all layers."""
    def write(o: Keys) -> dict[str, Any]:
        letters = all_letters(o)
        if len(set(letters)) > 1:
            raise Unsupported(f"window_pattern={letters} has layers with and without a window")
        return {"sliding_window": o["sliding_window"] if letters[0] == "S" else None}

    return KeyRule({"sliding_window": default},
                   lambda t: {"sliding_window": t["sliding_window"], "window_pattern": "S"}, write)


def all_letters(o: Keys) -> str:
    """A letter for each layer: S with a window, L without."""
    n: int = o["n_layer"]
    return "L" * n if o["sliding_window"] is None else (o["window_pattern"] * n)[:n]


def windows(default: int | None, pattern: str, more: Mapping[str, Any] | None = None) -> KeyRule:
    """Layers with and without a window, listed in layer_types.

    Args:
        default: of sliding_window.
        pattern: the default pattern; "Q": Qwen's, from max_window_layers on and only with use_sliding_window; "M":
            Ministral's, all layers if there is a window.
        more: the defaults of other keys that decide it.
    """
    def read(t: Keys) -> dict[str, Any]:
        n, size, types = t["num_hidden_layers"], t["sliding_window"], t["layer_types"]
        if "use_sliding_window" in t and not t["use_sliding_window"]:
            size = None
        if types is not None:
            names = {"sliding_attention": "S", "full_attention": "L"}
            if len(types) != n or not set(types) <= names.keys():
                raise Unsupported(f"layer_types: {short_repr(types)} is not supported (for each of {n} layers "
                                  "sliding_attention or full_attention)")
            letters = "".join(names[name] for name in types)
        elif pattern == "Q":
            letters = "".join("S" if size and i >= t["max_window_layers"] else "L" for i in range(n))
        elif pattern == "M":
            letters = "S" * n
        else:
            every = t.get("sliding_window_pattern", len(pattern))
            letters = (("S" * (every - 1) + "L") * n)[:n] if pattern[-1] == "L" else (pattern * n)[:n]
        if size is None or "S" not in letters:
            if size is None and "S" in letters and types is not None:
                raise Unsupported("layer_types: has layers with a window, and sliding_window is not set")
            return {"sliding_window": None, "window_pattern": "S"}
        return {"sliding_window": size, "window_pattern": shortest_pattern(letters)}

    def write(o: Keys) -> dict[str, Any]:
        letters = all_letters(o)
        keys = {"sliding_window": o["sliding_window"] if "S" in letters else default,
                "layer_types": ["sliding_attention" if letter == "S" else "full_attention" for letter in letters]}
        return keys | ({"use_sliding_window": "S" in letters} if pattern == "Q" else {})

    return KeyRule({"sliding_window": default, "layer_types": None, **(more or {})}, read, write)


QWEN_WINDOWS = windows(4096, "Q", {"use_sliding_window": False, "max_window_layers": 28})


# ---------------------------------------------------------------- other keys


def query_scalar(default: float) -> KeyRule:
    """Gemma's query_pre_attn_scalar s: scores are multiplied by 1 / sqrt(s)."""
    def write(o: Keys) -> dict[str, Any]:
        scalar = o["attn_scale"]**-2
        if abs(scalar - round(scalar)) > 1e-9 * scalar:
            raise Unsupported(f"query_pre_attn_scalar is an integer, not {scalar:g}")
        return {"query_pre_attn_scalar": round(scalar)}

    return KeyRule({"query_pre_attn_scalar": default},
                   lambda t: {"attn_scale": t["query_pre_attn_scalar"]**-0.5}, write)


def inverse(value: float) -> float:
    """1 / value, as the short decimal number whose inverse is `value` again, if there is one."""
    short = float(f"{1 / value:.12g}")
    return short if 1 / short == value else 1 / value


def falcon_read(t: Keys) -> dict[str, Any]:
    """Falcon's four switches: how many key/value heads, in sequence or in parallel, on one norm or two."""
    if t["alibi"]:
        raise Unsupported("alibi: True is not supported (Falcon divides the bias by sqrt(head_dim), too)")
    new, norms = t["new_decoder_architecture"], t["num_ln_in_parallel_attn"]
    heads = t["num_attention_heads"]
    keys = {"n_kv_head": (t["num_kv_heads"] or heads) if new else 1 if t["multi_query"] else heads}
    if not t["parallel_attn"]:
        if new:
            raise Unsupported("parallel_attn: False is not supported with new_decoder_architecture")
        return keys | {"parallel_block": "none"}
    if not new and norms == 2:
        raise Unsupported("num_ln_in_parallel_attn: 2 is not supported without new_decoder_architecture")
    return keys | {"parallel_block": "two_norms" if new and norms in (None, 2) else "one_norm"}


def falcon_write(o: Keys) -> dict[str, Any]:
    new = o["parallel_block"] == "two_norms" or (o["parallel_block"] == "one_norm"
                                                 and o["n_kv_head"] not in (1, o["n_head"]))
    return {"alibi": False, "new_decoder_architecture": new, "multi_query": o["n_kv_head"] == 1,
            "parallel_attn": o["parallel_block"] != "none", "num_kv_heads": o["n_kv_head"],
            "num_ln_in_parallel_attn": {"two_norms": 2, "one_norm": 1}.get(o["parallel_block"]) if new else None}


def no_rope_read(t: Keys) -> dict[str, Any]:
    """SmolLM3's layers without RoPE: 0 in no_rope_layers, else every fourth."""
    n, layers, every = t["num_hidden_layers"], t["no_rope_layers"], t["no_rope_layer_interval"]
    if layers is None:
        layers = [int((i + 1) % every != 0) for i in range(n)]
    if len(layers) != n or not set(layers) <= {0, 1}:
        raise Unsupported(f"no_rope_layers: {short_repr(layers)} is not supported (for each of {n} layers 1: RoPE, or "
                          "0: none)")
    return {"rope_pattern": shortest_pattern("".join("NR"[layer] for layer in layers))}


def no_rope_write(o: Keys) -> dict[str, Any]:
    letters = (o["rope_pattern"] * o["n_layer"])[:o["n_layer"]]
    return {"no_rope_layers": [int(letter == "R") for letter in letters]}


# ---------------------------------------------------------------- tensors


def block(*rules: tuple[Any, ...], prefix: str = "model.layers.{i}.", **when: Any) -> tuple[TensorRule, ...]:
    """The rules of a layer: (name in it, name or names in a block here, layout)."""
    return tuple(TensorRule(prefix + theirs, tuple(f"blocks.{{i}}.{name}" for name in
                                                   ((ours,) if isinstance(ours, str) else ours)),
                            layout[0] if layout else SAME, when)
                 for theirs, ours, *layout in rules)


QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
TOP = (TensorRule("model.embed_tokens", ("token_embedding",)), TensorRule("model.norm", ("final_norm",)),
       TensorRule("lm_head", ("lm_head",)))
ATTENTION = (*((f"self_attn.{name[5:]}", name) for name in QKV), ("self_attn.o_proj", "attn.o_proj"))
PRE_NORMS = (("input_layernorm", "attn_residual.norm"), ("post_attention_layernorm", "ffn_residual.norm"))
GATED_FFN = tuple((f"mlp.{name}", f"ffn.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
QK_NORMS = (("self_attn.q_norm", "attn.qk_norm.q_norm"), ("self_attn.k_norm", "attn.qk_norm.k_norm"))
LLAMA = (*TOP, *block(*ATTENTION, *PRE_NORMS, *GATED_FFN))
SANDWICH = (*TOP, *block(*ATTENTION, *GATED_FFN, ("input_layernorm", "attn_residual.norm"),
                         ("post_attention_layernorm", "attn_residual.norm_after"),
                         ("pre_feedforward_layernorm", "ffn_residual.norm"),
                         ("post_feedforward_layernorm", "ffn_residual.norm_after")))
OLMO = (*TOP, *block(*ATTENTION, *GATED_FFN, *QK_NORMS, ("post_attention_layernorm", "attn_residual.norm"),
                     ("post_feedforward_layernorm", "ffn_residual.norm")))
FFN_4H = (("mlp.dense_h_to_4h", "ffn.up_proj"), ("mlp.dense_4h_to_h", "ffn.down_proj"))
BLOOM_TOP = (TensorRule("transformer.word_embeddings", ("token_embedding",)),
             TensorRule("transformer.ln_f", ("final_norm",)), TensorRule("lm_head", ("lm_head",)))
BLOOM_BLOCK = (("self_attention.query_key_value", QKV, Grouped()), ("self_attention.dense", "attn.o_proj"), *FFN_4H)

RMS = dict(normalization="rmsnorm", norm_position="pre", position_encoding="rope")
GEMMA_RMS = dict(RMS, normalization="rmsnorm_gemma", embedding_scale="sqrt")
NO_BIAS = dict(bias=False, qkv_bias=False)
ALL_BIAS = dict(bias=True, qkv_bias=True)


FAMILIES: dict[str, Family] = {family.model_type: family for family in (
    Family("llama", "LlamaForCausalLM", "LLaMA 1 to 3.3, TinyLlama, SmolLM2, Falcon 3", "model.", RMS, (
        *sizes(2048, 32000, 4096, 11008, 32, 32), kv_heads(None), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(False), rope(), biases("mlp_bias")), LLAMA,
        unread={"is_llama_config": True, "activation": "swiglu"}),  # SmolLM2's, Falcon 3's
    Family("mistral", "MistralForCausalLM", "Mistral 7B, Mistral Nemo, Mistral Small", "model.", RMS | NO_BIAS, (
        *sizes(4096 * 32, 32000, 4096, 14336, 32, 32), kv_heads(8), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(False), rope(), window(4096)), LLAMA),
    Family("ministral", "MinistralForCausalLM", "Ministral 8B", "model.", RMS | NO_BIAS, (
        *sizes(4096 * 32, 32000, 4096, 14336, 32, 32), kv_heads(8), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(False), rope(), windows(4096, "M")), LLAMA),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen 2, Qwen 2.5", "model.", RMS | dict(bias=False, qkv_bias=True), (
        *sizes(32768, 151936, 4096, 22016, 32, 32), kv_heads(32), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(False), rope(), QWEN_WINDOWS), LLAMA),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen 3", "model.", RMS | dict(qk_norm="head"), (
        *sizes(32768, 151936, 4096, 22016, 32, 32), kv_heads(32), head_dim(128), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(False), rope(), QWEN_WINDOWS, biases(None)),
        (*LLAMA, *block(*QK_NORMS))),
    Family("gemma", "GemmaForCausalLM", "Gemma 1", "model.", GEMMA_RMS, (
        *sizes(8192, 256000, 3072, 24576, 28, 16), kv_heads(16), head_dim(256),
        choice("hidden_act", "gelu_pytorch_tanh", GATED | {"gelu": GATED["gelu_pytorch_tanh"]}),  # as transformers
        required("hidden_activation", None, "gelu_pytorch_tanh"), same("rms_norm_eps", "norm_eps", 1e-6), tied(True),
        rope(), biases(None), off("use_bidirectional_attention")), LLAMA),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma 2", "model.", GEMMA_RMS | dict(norm_position="sandwich"), (
        *sizes(8192, 256000, 2304, 9216, 26, 8), kv_heads(4), head_dim(256),
        choice("hidden_activation", "gelu_pytorch_tanh", GATED), required("hidden_act", "gelu_pytorch_tanh"),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(True), rope(), biases(None), query_scalar(256),
        same("attn_logit_softcapping", "attn_softcap", 50.0), same("final_logit_softcapping", "logit_softcap", 30.0),
        windows(4096, "SL"), off("use_bidirectional_attention")), SANDWICH),
    Family("gemma3_text", "Gemma3ForCausalLM", "Gemma 3 (270M, 1B; text)", "model.",
           GEMMA_RMS | dict(norm_position="sandwich", qk_norm="head"), (
        *sizes(131072, 262208, 2304, 9216, 26, 8), kv_heads(4), head_dim(256),
        choice("hidden_activation", "gelu_pytorch_tanh", GATED), required("hidden_act", "gelu_pytorch_tanh"),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(True), rope_by_layer(1_000_000.0, 10_000.0), biases(None),
        query_scalar(256), off("attn_logit_softcapping"), same("final_logit_softcapping", "logit_softcap", None),
        windows(4096, "SSSSSL", {"sliding_window_pattern": 6}), off("use_bidirectional_attention", False)),
        (*SANDWICH, *block(*QK_NORMS)), aliases={"_sliding_window_pattern": "sliding_window_pattern"}),
    Family("olmo2", "Olmo2ForCausalLM", "OLMo 2", "model.",
           RMS | NO_BIAS | dict(norm_position="reordered", qk_norm="projection"), (
        *sizes(2048, 50304, 4096, 11008, 32, 32), kv_heads(None), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-5), tied(False), rope(), off("attention_bias", False)), OLMO),
    Family("olmo3", "Olmo3ForCausalLM", "OLMo 3", "model.",
           RMS | NO_BIAS | dict(norm_position="reordered", qk_norm="projection"), (
        *sizes(2048, 50304, 4096, 11008, 32, 32), kv_heads(None), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-5), tied(False), rope_by_layer(500_000.0, None),
        off("attention_bias", False), windows(4096, "SSSL")), OLMO),
    Family("smollm3", "SmolLM3ForCausalLM", "SmolLM 3", "model.", RMS, (
        *sizes(32768, 128256, 2048, 11008, 36, 16), kv_heads(4), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(True), rope(2_000_000.0), biases("mlp_bias"),
        windows(None, "Q", {"use_sliding_window": False, "max_window_layers": 28}),
        KeyRule({"no_rope_layers": None, "no_rope_layer_interval": 4}, no_rope_read, no_rope_write)), LLAMA),
    Family("granite", "GraniteForCausalLM", "Granite 3 (dense)", "model.", RMS, (
        *sizes(2048, 32000, 4096, 11008, 32, 32), kv_heads(None), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-6), tied(False), rope(), biases("mlp_bias"),
        converted("embedding_multiplier", "embedding_scale", 1.0, float, float),
        converted("attention_multiplier", "attn_scale", 1.0, float, float),
        converted("residual_multiplier", "residual_scale", 1.0, float, float),
        converted("logits_scaling", "logit_scale", 1.0, lambda v: 1 / v, inverse)), LLAMA),
    Family("starcoder2", "Starcoder2ForCausalLM", "StarCoder 2", "model.",
           dict(normalization="layernorm", norm_position="pre", position_encoding="rope"), (
        *sizes(4096, 49152, 3072, 12288, 30, 24), kv_heads(2), head_dim(),
        choice("hidden_act", "gelu_pytorch_tanh", PLAIN), same("norm_epsilon", "norm_eps", 1e-5), tied(True), rope(),
        window(None), required("mlp_type", "default"), required("norm_type", "layer_norm"),
        KeyRule({"use_bias": True}, lambda t: {"bias": t["use_bias"], "qkv_bias": t["use_bias"]},
                lambda o: {"use_bias": o["bias"]})),
        (*TOP, *block(*ATTENTION, *PRE_NORMS, ("mlp.c_fc", "ffn.up_proj"), ("mlp.c_proj", "ffn.down_proj"))),
        {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}, True,
        {"layer_norm_epsilon": "norm_epsilon"}, unread={"activation_function": "gelu", "scale_attn_weights": True}),
    Family("stablelm", "StableLmForCausalLM", "StableLM 2 1.6B, StableLM 3B", "model.",
           dict(normalization="layernorm", norm_position="pre", position_encoding="rope", bias=False), (
        *sizes(4096, 50304, 2560, 6912, 32, 32), kv_heads(32), choice("hidden_act", "silu", GATED),
        same("layer_norm_eps", "norm_eps", 1e-5), tied(False), rope(fraction=0.25),
        same("use_qkv_bias", "qkv_bias", False), off("qk_layernorm", False),
        choice("use_parallel_residual", False,
               {False: dict(parallel_block="none"), True: dict(parallel_block="one_norm")})), LLAMA,
        {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    Family("phi", "PhiForCausalLM", "Phi 1, 1.5, 2", "model.",
           dict(ALL_BIAS, normalization="layernorm", norm_position="pre", position_encoding="rope", head_bias=True,
                parallel_block="one_norm"), (
        *sizes(2048, 51200, 2048, 8192, 24, 32), kv_heads(None), head_dim(), choice("hidden_act", "gelu_new", PLAIN),
        same("layer_norm_eps", "norm_eps", 1e-5), tied(False), rope(fraction=0.5), off("qk_layernorm", False)),
        (TOP[0], TensorRule("model.final_layernorm", ("final_norm",)), TOP[2],
         *block(*ATTENTION[:3], ("self_attn.dense", "attn.o_proj"), PRE_NORMS[0], ("mlp.fc1", "ffn.up_proj"),
                ("mlp.fc2", "ffn.down_proj"))),
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}, True),
    Family("phi3", "Phi3ForCausalLM", "Phi 3 4K, Phi 4", "model.", RMS | NO_BIAS, (
        *sizes(4096, 32064, 3072, 8192, 32, 32), kv_heads(None), head_dim(), choice("hidden_act", "silu", GATED),
        same("rms_norm_eps", "norm_eps", 1e-5), tied(False), rope(fraction=1.0, outer_context=4096), window(None),
        off("attention_bias", False)),
        (*TOP, *block(("self_attn.qkv_proj", QKV, Stacked()), ATTENTION[3], *PRE_NORMS,
                      ("mlp.gate_up_proj", ("ffn.gate_proj", "ffn.up_proj"), Stacked()), GATED_FFN[2])),
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}),
    Family("cohere", "CohereForCausalLM", "Command R (without QK-norm), Aya", "model.",
           dict(NO_BIAS, normalization="layernorm_nobias", norm_position="pre", position_encoding="rope",
                parallel_block="one_norm"), (
        *sizes(8192, 256000, 8192, 22528, 40, 64), kv_heads(None), head_dim(), choice("hidden_act", "silu", GATED),
        same("layer_norm_eps", "norm_eps", 1e-5), tied(True), rope(500_000.0), off("attention_bias", False),
        off("use_qk_norm", False), converted("logit_scale", "logit_scale", 0.0625, float, float)),
        (*TOP, *block(("self_attn.q_proj", "attn.q_proj", Interleaved()),
                      ("self_attn.k_proj", "attn.k_proj", Interleaved()), *ATTENTION[2:], PRE_NORMS[0], *GATED_FFN))),
    Family("gpt_neox", "GPTNeoXForCausalLM", "Pythia, GPT-NeoX", "gpt_neox.",
           dict(normalization="layernorm", norm_position="pre", position_encoding="rope", **ALL_BIAS), (
        *sizes(2048, 50432, 6144, 24576, 44, 64), choice("hidden_act", "gelu", PLAIN),
        same("layer_norm_eps", "norm_eps", 1e-5), tied(False),
        rope(fraction=0.25, names=("rotary_emb_base", "rotary_pct")), required("attention_bias", True),
        choice("use_parallel_residual", True,
               {True: dict(parallel_block="two_norms"), False: dict(parallel_block="none")})),
        (TensorRule("gpt_neox.embed_in", ("token_embedding",)),
         TensorRule("gpt_neox.final_layer_norm", ("final_norm",)), TensorRule("embed_out", ("lm_head",)),
         *block(*PRE_NORMS, ("attention.query_key_value", QKV, Grouped()), ("attention.dense", "attn.o_proj"), *FFN_4H,
                prefix="gpt_neox.layers.{i}.")),
        {"attention_dropout": 0.0, "hidden_dropout": 0.0}, True,
        buffers=r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$"),
    Family("gpt2", "GPT2LMHeadModel", "GPT-2", "transformer.",
           dict(ALL_BIAS, normalization="layernorm", norm_position="pre", position_encoding="learned_absolute"), (
        same("vocab_size", "vocab_size", 50257), same("n_embd", "n_embd", 768), same("n_layer", "n_layer", 12),
        same("n_head", "n_head", 12), same("n_positions", "block_size", 1024),
        derived("n_inner", "d_ff", None, lambda t: 4 * t["n_embd"]), choice("activation_function", "gelu_new", {
            "gelu_new": PLAIN["gelu_new"], **PLAIN}), same("layer_norm_epsilon", "norm_eps", 1e-5), tied(True),
        required("scale_attn_weights", True), off("scale_attn_by_inverse_layer_idx", False)),
        (TensorRule("transformer.wte", ("token_embedding",)),
         TensorRule("transformer.wpe", ("position.embedding",), Rows()),
         TensorRule("transformer.ln_f", ("final_norm",)), TensorRule("lm_head", ("lm_head",)),
         *block(("ln_1", "attn_residual.norm"), ("ln_2", "ffn_residual.norm"),
                ("attn.c_attn", QKV, StackedTransposed()), ("attn.c_proj", "attn.o_proj", Transposed()),
                ("mlp.c_fc", "ffn.up_proj", Transposed()), ("mlp.c_proj", "ffn.down_proj", Transposed()),
                prefix="transformer.h.{i}.")),
        {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, True,
        {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
         "max_position_embeddings": "n_positions"}, r"attn\.(bias|masked_bias)$"),
    Family("bloom", "BloomForCausalLM", "BLOOM, BLOOMZ", "transformer.",
           dict(ALL_BIAS, normalization="layernorm", norm_position="pre", position_encoding="alibi",
                embedding_norm=True, ffn_type="standard", activation="gelu_tanh"), (
        same("vocab_size", "vocab_size", 250880), same("n_layer", "n_layer", 2), same("n_head", "n_head", 8),
        KeyRule({"hidden_size": 64}, lambda t: {"n_embd": t["hidden_size"], "d_ff": 4 * t["hidden_size"]},
                lambda o: {"hidden_size": o["n_embd"]}),
        same("seq_length", "block_size", 2048), same("layer_norm_epsilon", "norm_eps", 1e-5), tied(True),
        off("apply_residual_connection_post_layernorm", False)),
        (*BLOOM_TOP, TensorRule("transformer.word_embeddings_layernorm", ("embedding_norm",)),
         *block(*PRE_NORMS, *BLOOM_BLOCK, prefix="transformer.h.{i}.")),
        {"hidden_dropout": 0.0, "attention_dropout": 0.0}, False,
        {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}),
    Family("falcon", "FalconForCausalLM", "Falcon 7B, 40B, Falcon 2", "transformer.",
           dict(normalization="layernorm", norm_position="pre", position_encoding="rope"), (
        same("vocab_size", "vocab_size", 65024), same("hidden_size", "n_embd", 4544),
        same("num_hidden_layers", "n_layer", 32), same("num_attention_heads", "n_head", 71),
        same("max_position_embeddings", "block_size", 2048), choice("activation", "gelu", PLAIN),
        derived("ffn_hidden_size", "d_ff", None, lambda t: 4 * t["hidden_size"]),
        same("layer_norm_epsilon", "norm_eps", 1e-5), tied(True), rope(),
        KeyRule({"bias": False}, lambda t: {"bias": t["bias"], "qkv_bias": t["bias"]}, lambda o: {"bias": o["bias"]}),
        KeyRule({"num_kv_heads": None, "alibi": False, "new_decoder_architecture": False, "multi_query": True,
                 "parallel_attn": True, "num_ln_in_parallel_attn": None}, falcon_read, falcon_write)),
        (*BLOOM_TOP, *block(*BLOOM_BLOCK, prefix="transformer.h.{i}."),
         *block(("ln_attn", "attn_residual.norm"), ("ln_mlp", "ffn_residual.norm"), prefix="transformer.h.{i}.",
                parallel_block="two_norms"),
         *block(PRE_NORMS[0], prefix="transformer.h.{i}.", parallel_block="one_norm"),
         *block(*PRE_NORMS, prefix="transformer.h.{i}.", parallel_block="none")),
        {"hidden_dropout": 0.0, "attention_dropout": 0.0}, False,
        {"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_head_kv": "num_kv_heads"}),
    Family("opt", "OPTForCausalLM", "OPT (not 350M)", "model.",
           dict(normalization="layernorm", norm_position="pre", position_encoding="learned_absolute", norm_eps=1e-5), (
        same("vocab_size", "vocab_size", 50272), same("num_hidden_layers", "n_layer", 12),
        same("num_attention_heads", "n_head", 12), same("ffn_dim", "d_ff", 3072), same("hidden_size", "n_embd", 768),
        same("max_position_embeddings", "block_size", 2048),
        choice("activation_function", "relu", {"relu": PLAIN["relu"], **PLAIN}), tied(True),
        required("do_layer_norm_before", True), off("_remove_final_layer_norm", False), off("layerdrop", 0.0),
        required("layer_norm_elementwise_affine", True),
        KeyRule({"word_embed_proj_dim": None}, lambda t: require_equal("word_embed_proj_dim", t, "hidden_size"),
                lambda o: {"word_embed_proj_dim": o["n_embd"]}),
        KeyRule({"enable_bias": True}, lambda t: {"bias": t["enable_bias"], "qkv_bias": t["enable_bias"]},
                lambda o: {"enable_bias": o["bias"]})),
        (TensorRule("model.decoder.embed_tokens", ("token_embedding",)),
         TensorRule("model.decoder.embed_positions", ("position.embedding",), Rows(2)),
         TensorRule("model.decoder.final_layer_norm", ("final_norm",)), TensorRule("lm_head", ("lm_head",)),
         *block(*ATTENTION[:3], ("self_attn.out_proj", "attn.o_proj"), ("self_attn_layer_norm", "attn_residual.norm"),
                ("final_layer_norm", "ffn_residual.norm"), ("fc1", "ffn.up_proj"), ("fc2", "ffn.down_proj"),
                prefix="model.decoder.layers.{i}.")),
        {"dropout": 0.1, "attention_dropout": 0.0}),
)}


def require_equal(name: str, t: Keys, other: str) -> dict[str, Any]:
    """Refuse a key that is set to something else than another key."""
    if t[name] not in (None, t[other]):
        raise Unsupported(f"{name}: {t[name]} is not supported (only {other}, {t[other]})")
    return {}
