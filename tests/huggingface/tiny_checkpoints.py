"""Tiny checkpoints that transformers writes: for each family at least three configurations in odd shapes.

Every tensor is random, norms and biases too: left at one and zero they would hide a swapped or forgotten tensor.
transformers computes norms, angles and softmax in float32 whatever the dtype of the model; `InFloat64` makes both sides
compute everything in float64, so that they must agree to its rounding.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

from blockgpt.huggingface import read
from model_builder import build_model
from model_config import ModelConfig

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CONTEXT = 24
SIZES: dict[str, Any] = dict(vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                             intermediate_size=80, max_position_embeddings=CONTEXT, pad_token_id=None,
                             bos_token_id=None, eos_token_id=7)
WIDE_HEADS = dict(num_key_value_heads=2, head_dim=20)  # head_dim is not hidden_size / num_attention_heads
LLAMA3 = dict(rope_type="llama3", factor=4.0, original_max_position_embeddings=8, low_freq_factor=1.0,
              high_freq_factor=4.0, rope_theta=500.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, rope_theta=900.0)
LINEAR = dict(rope_type="linear", factor=3.0, rope_theta=700.0)
GPT2_SIZES: dict[str, Any] = dict(vocab_size=61, n_embd=48, n_layer=2, n_head=4, n_positions=CONTEXT, resid_pdrop=0.0,
                                  embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=7)
BLOOM_SIZES: dict[str, Any] = dict(vocab_size=61, hidden_size=48, n_layer=2, n_head=4, bos_token_id=None,
                                   eos_token_id=7)
OPT_SIZES: dict[str, Any] = dict(vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=80,
                                 word_embed_proj_dim=48, max_position_embeddings=CONTEXT, dropout=0.0,
                                 bos_token_id=None, eos_token_id=7, pad_token_id=None)

# {family: {what is odd: keys of its configuration}}, with SIZES for the families that have those names.
CHECKPOINTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"grouped, tied, theta": dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-3,
                                           rope_parameters=dict(rope_type="default", rope_theta=300.0)),
              "wide heads, biases, llama3": dict(**WIDE_HEADS, attention_bias=True, mlp_bias=True,
                                                 rope_parameters=LLAMA3),
              "one kv head, GELU, yarn": dict(num_key_value_heads=1, hidden_act="gelu", rope_parameters=YARN),
              "linear": dict(rope_parameters=LINEAR, hidden_act="gelu_pytorch_tanh")},
    "mistral": {"window": dict(sliding_window=5, **WIDE_HEADS),
                "no window, tied": dict(sliding_window=None, num_key_value_heads=1, tie_word_embeddings=True,
                                        rms_norm_eps=1e-3),
                "window, yarn, ReLU": dict(sliding_window=7, num_key_value_heads=4, hidden_act="relu",
                                           rope_parameters=YARN)},
    "ministral": {"windows in one layer of two": dict(sliding_window=5, **WIDE_HEADS, layer_types=[
                      "full_attention", "sliding_attention"]),
                  "windows everywhere": dict(sliding_window=3, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-3,
                                             hidden_act="gelu"),
                  "no window, tied": dict(sliding_window=4, tie_word_embeddings=True, num_key_value_heads=1,
                                          head_dim=6, layer_types=["full_attention"] * 2, rope_parameters=LINEAR)},
    "qwen2": {"grouped": dict(num_key_value_heads=2, rms_norm_eps=1e-3, hidden_act="gelu"),
              "tied, theta": dict(num_key_value_heads=1, tie_word_embeddings=True,
                                  rope_parameters=dict(rope_type="default", rope_theta=300.0)),
              "windows from layer 1 on": dict(num_key_value_heads=4, use_sliding_window=True, sliding_window=5,
                                              max_window_layers=1, rope_parameters=YARN)},
    "qwen3": {"wide heads": dict(**WIDE_HEADS, rms_norm_eps=1e-3),
              "tied, narrow heads": dict(num_key_value_heads=1, head_dim=6, tie_word_embeddings=True,
                                         rope_parameters=dict(rope_type="default", rope_theta=300.0)),
              "windows": dict(num_key_value_heads=4, head_dim=12, use_sliding_window=True, sliding_window=5,
                              max_window_layers=0, rope_parameters=YARN, hidden_act="gelu")},
    "gemma": {"one kv head": dict(num_key_value_heads=1, head_dim=20),
              "grouped": dict(num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-3,
                              rope_parameters=dict(rope_type="default", rope_theta=300.0)),
              "untied": dict(num_key_value_heads=4, head_dim=6, tie_word_embeddings=False, hidden_act="relu",
                         rope_parameters=LINEAR)},
    "gemma2": {"softcaps, windows": dict(**WIDE_HEADS, sliding_window=5, query_pre_attn_scalar=9,
                                         attn_logit_softcapping=0.5, final_logit_softcapping=1.5),
               "no caps, reversed windows": dict(num_key_value_heads=1, head_dim=12, sliding_window=4,
                                                 attn_logit_softcapping=None, final_logit_softcapping=None,
                                                 rms_norm_eps=1e-3,
                                                 layer_types=["full_attention", "sliding_attention"]),
               "untied": dict(num_key_value_heads=4, head_dim=6, tie_word_embeddings=False, query_pre_attn_scalar=24,
                              hidden_activation="relu", rope_parameters=LINEAR)},
    "gemma3_text": {"two bases": dict(**WIDE_HEADS, sliding_window=5, query_pre_attn_scalar=9, layer_types=[
                        "sliding_attention", "full_attention"], rope_parameters=dict(
                            sliding_attention=dict(rope_type="default", rope_theta=50.0),
                            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=300.0))),
                    "six layers, softcap": dict(num_hidden_layers=6, num_key_value_heads=1, head_dim=12,
                                                sliding_window=4, final_logit_softcapping=1.5, rms_norm_eps=1e-3),
                    "untied, no window": dict(num_key_value_heads=4, head_dim=6, tie_word_embeddings=False,
                                              query_pre_attn_scalar=24, sliding_window=4, hidden_activation="relu",
                                              layer_types=["full_attention"] * 2)},
    "olmo2": {"grouped": dict(num_key_value_heads=2, rms_norm_eps=1e-3),
              "tied, theta": dict(num_key_value_heads=1, tie_word_embeddings=True,
                                  rope_parameters=dict(rope_type="default", rope_theta=300.0)),
              "yarn": dict(num_key_value_heads=4, hidden_act="gelu", rope_parameters=YARN)},
    "olmo3": {"windows": dict(num_key_value_heads=2, num_hidden_layers=4, sliding_window=5, hidden_act="gelu"),
              "scaled global layers": dict(num_key_value_heads=1, sliding_window=4, rms_norm_eps=1e-3, layer_types=[
                  "sliding_attention", "full_attention"], rope_parameters=dict(
                      sliding_attention=dict(rope_type="default", rope_theta=300.0),
                      full_attention=dict(YARN, rope_theta=300.0))),
              "no window, tied": dict(num_key_value_heads=4, tie_word_embeddings=True, sliding_window=4,
                                      layer_types=["full_attention"] * 2)},
    "smollm3": {"a layer of four without RoPE": dict(num_key_value_heads=2, num_hidden_layers=5, hidden_act="gelu"),
                "biases, untied": dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True,
                                       tie_word_embeddings=False, no_rope_layers=[0, 1], rms_norm_eps=1e-3),
                "windows": dict(num_key_value_heads=4, num_hidden_layers=3, no_rope_layer_interval=2,
                                use_sliding_window=True, sliding_window=5, rope_parameters=YARN,
                                layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
                "RoPE everywhere": dict(num_key_value_heads=4, no_rope_layers=[1, 1])},
    "granite": {"multipliers": dict(**WIDE_HEADS, embedding_multiplier=3.0, attention_multiplier=0.4,
                                    residual_multiplier=0.3, logits_scaling=6.0),
                "tied": dict(num_key_value_heads=1, tie_word_embeddings=True, attention_multiplier=0.2,
                             hidden_act="relu",
                             embedding_multiplier=12.0, rms_norm_eps=1e-3),
                "biases": dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True, residual_multiplier=0.22,
                               logits_scaling=16.0, rope_parameters=YARN)},
    "starcoder2": {"window": dict(num_key_value_heads=2, sliding_window=5),
                   "untied, ReLU": dict(num_key_value_heads=1, tie_word_embeddings=False, hidden_act="relu",
                                        norm_epsilon=1e-3),
                   "no biases": dict(num_key_value_heads=4, use_bias=False, rope_parameters=LINEAR)},
    "stablelm": {"grouped": dict(num_key_value_heads=2, partial_rotary_factor=0.5),
                 "parallel, biases": dict(num_key_value_heads=1, use_parallel_residual=True, use_qkv_bias=True,
                                          layer_norm_eps=1e-3, partial_rotary_factor=0.5),
                 "tied": dict(num_key_value_heads=4, tie_word_embeddings=True, use_qkv_bias=True, hidden_act="gelu",
                              rope_parameters=dict(LINEAR, partial_rotary_factor=1.0))},
    "phi": {"grouped": dict(num_key_value_heads=2),
            "tied": dict(num_key_value_heads=1, tie_word_embeddings=True, layer_norm_eps=1e-3),
            "all rotated": dict(num_key_value_heads=4, hidden_act="relu", rope_parameters=dict(
                LINEAR, partial_rotary_factor=1.0))},
    "phi3": {"grouped": dict(num_key_value_heads=2, partial_rotary_factor=0.5),
             "window": dict(num_key_value_heads=1, sliding_window=5, rms_norm_eps=1e-3, rope_parameters=dict(
                 rope_type="default", rope_theta=300.0, partial_rotary_factor=0.5)),
             "tied": dict(num_key_value_heads=4, tie_word_embeddings=True, hidden_act="gelu", rope_parameters=dict(
                 rope_type="default", rope_theta=300.0, partial_rotary_factor=1.0))},
    "cohere": {"grouped": dict(num_key_value_heads=2, logit_scale=0.25),
               "untied": dict(num_key_value_heads=1, tie_word_embeddings=False, layer_norm_eps=1e-3),
               "theta": dict(num_key_value_heads=4, hidden_act="gelu", logit_scale=1.5, rope_parameters=LINEAR)},
    "gpt_neox": {"half rotated": dict(rotary_pct=0.5, layer_norm_eps=1e-3),
                 "in sequence, tied": dict(rotary_pct=0.5, use_parallel_residual=False, tie_word_embeddings=True,
                                           hidden_act="relu"),
                 "all rotated, linear": dict(rope_parameters=dict(LINEAR, partial_rotary_factor=1.0))},
    "gpt2": {"as released": dict(),
             "narrow FFN, untied": dict(n_inner=40, tie_word_embeddings=False, layer_norm_epsilon=1e-3),
             "GELU, three layers": dict(n_layer=3, activation_function="gelu", n_head=2)},
    "bloom": {"as released": dict(),
              "untied": dict(tie_word_embeddings=False, layer_norm_epsilon=1e-3, n_head=2),
              "eight heads": dict(n_head=8, n_layer=3)},
    "falcon": {"7B: one kv head, one norm": dict(ffn_hidden_size=80, tie_word_embeddings=False),
               "40B: grouped, two norms": dict(new_decoder_architecture=True, num_kv_heads=2, bias=True,
                                               layer_norm_epsilon=1e-3),
               "11B: grouped, one norm": dict(new_decoder_architecture=True, num_kv_heads=2,
                                              num_ln_in_parallel_attn=1, activation="relu",
                                              rope_parameters=LINEAR),
               "in sequence, all heads": dict(multi_query=False, parallel_attn=False, bias=True)},
    "opt": {"as released": dict(),
            "untied, GELU": dict(tie_word_embeddings=False, activation_function="gelu"),
            "no biases": dict(enable_bias=False, num_attention_heads=2, num_hidden_layers=3)},
}
FALCON_SIZES = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
OWN_SIZES = {"gpt2": GPT2_SIZES, "bloom": BLOOM_SIZES, "opt": OPT_SIZES, "falcon": FALCON_SIZES}
NAMES = [(family, name) for family, checkpoints in CHECKPOINTS.items() for name in checkpoints]

# Largest difference of the logits, relative to the largest logit. BLOOM writes sqrt(2 / pi) with eight digits.
TOLERANCE = {family: 1e-10 for family in CHECKPOINTS} | {"bloom": 1e-8}


class InFloat64(TorchFunctionMode):
    """float32 means float64, in every torch function that is told a dtype."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


@contextlib.contextmanager
def in_float64():
    """Every computation in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Random values for every parameter: matrices around 0, vectors around 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            centre = 0.5 if p.dim() < 2 and not name.endswith("bias") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.15 + centre)


def reference_model(family: str, name: str, **more: Any) -> transformers.PreTrainedModel:
    """The model of transformers, random, in float64. Called within `in_float64`."""
    sizes = OWN_SIZES.get(family, SIZES)
    config = transformers.AutoConfig.for_model(family, **{**sizes, **CHECKPOINTS[family][name], **more})
    config._attn_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.double().eval()
    randomise(model)
    if family == "opt":  # of the positions of padding, which no model here has
        model.model.decoder.embed_positions.weight.data[:2] = 0.0
    return model


def save(model: transformers.PreTrainedModel, directory: Path, **more: Any) -> Path:
    """The model as transformers saves it."""
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(directory, **more)
    return directory


def load(directory: Path, **overrides: Any):
    """(our model, `Weights`) of a checkpoint, in float64."""
    keys, _ = read.architecture(directory)
    config = ModelConfig(**{**keys, **overrides}).resolve()
    model = build_model(config).double().eval()
    weights = read.Weights(directory, read.find_family(read.read_config(directory)), config.flat(),
                           {n: p.shape for n, p in model.named_parameters()})
    with torch.no_grad():
        for n, p in model.named_parameters():
            weights.read_into(n, p, [0] * p.dim())
    return model, weights


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, (2, CONTEXT), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())
