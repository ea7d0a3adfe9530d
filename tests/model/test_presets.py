"""Whole models: each preset against the same family in transformers, and the released models' parameter counts."""

import typing

import pytest
import torch
import transformers
from architectures import count_parameters
from parity import TINY

from blockgpt.huggingface.families import FAMILIES
from blockgpt.huggingface.rules import read_keys
from blockgpt.huggingface.write import differing_keys
from model_builder import build_model
from model_config import ModelConfig, get_preset
from tools.convert_hf import effective_keys


class Same(typing.NamedTuple):
    """A preset with keys, and the configuration in transformers that is the same model.

    preset, keys: of this project.
    model_type: of transformers; hf_keys: the arguments of its configuration class.
    """

    preset: str
    keys: dict
    model_type: str
    hf_keys: dict


SIZES = dict(vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
             max_position_embeddings=24, pad_token_id=None)
YARN = dict(factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0)
SAME = {
    "llama": Same("llama", dict(), "llama", dict(SIZES, rms_norm_eps=1e-5, rope_theta=10000.0)),
    "llama, tied, grouped": Same(
        "llama", dict(n_kv_head=2, weight_tying=True), "llama",
        dict(SIZES, rms_norm_eps=1e-5, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama with biases and yarn": Same(
        "llama", dict(bias=True, rope_scaling="yarn", rope_scaling_factor=4.0, rope_original_context=16), "llama",
        dict(SIZES, rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True,
             rope_parameters=dict(YARN, rope_type="yarn", rope_theta=10000.0))),
    "llama3": Same(
        "llama3", dict(n_kv_head=2, rope_scaling="llama3", rope_scaling_factor=4.0, rope_original_context=16), "llama",
        dict(SIZES, rms_norm_eps=1e-5, num_key_value_heads=2,
             rope_parameters=dict(LLAMA3, rope_type="llama3", rope_theta=500_000.0))),
    "qwen3": Same(
        "qwen3", dict(n_kv_head=2, head_dim=20), "qwen3",
        dict(SIZES, num_key_value_heads=2, head_dim=20, rms_norm_eps=1e-6, tie_word_embeddings=True,
             rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0))),
    "qwen2": Same(
        "llama", dict(n_kv_head=2, qkv_bias=True, rope_theta=1_000_000.0, norm_eps=1e-6), "qwen2",
        dict(SIZES, num_key_value_heads=2, rms_norm_eps=1e-6,
             rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0))),
    "mistral": Same(
        "llama", dict(n_kv_head=2, sliding_window=7), "mistral",
        dict(SIZES, num_key_value_heads=2, rms_norm_eps=1e-5, sliding_window=7)),
    "gemma": Same(
        "gemma2", dict(n_kv_head=1, head_dim=20, norm_position="pre", sliding_window=None, attn_softcap=None,
                       logit_softcap=None), "gemma",
        dict(SIZES, num_key_value_heads=1, head_dim=20, rms_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh")),
    "gemma2": Same(  # softcaps and window small enough to matter, a scale other than both defaults
        "gemma2", dict(n_kv_head=2, head_dim=20, sliding_window=5, attn_scale=9**-0.5, attn_softcap=0.5,
                       logit_softcap=1.5), "gemma2",
        dict(SIZES, num_key_value_heads=2, head_dim=20, sliding_window=5, query_pre_attn_scalar=9,
             attn_logit_softcapping=0.5, final_logit_softcapping=1.5)),
    "gemma3, one layer in six global": Same(
        "gemma3", dict(n_layer=6, n_kv_head=1, head_dim=20, sliding_window=5), "gemma3_text",
        dict(SIZES, num_hidden_layers=6, num_key_value_heads=1, head_dim=20, sliding_window=5,
             query_pre_attn_scalar=20)),
    "gemma3, its global layers scaled": Same(
        "gemma3", dict(head_dim=20, sliding_window=5, window_pattern="SL", attn_scale=9**-0.5,
                       rope_scaling="linear", rope_scaling_factor=8.0), "gemma3_text",
        dict(SIZES, num_key_value_heads=4, head_dim=20, sliding_window=5, query_pre_attn_scalar=9,
             layer_types=["sliding_attention", "full_attention"],
             rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=10_000.0),
                                  full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1_000_000.0)))),
    "olmo2": Same(
        "olmo2", dict(n_kv_head=2), "olmo2",
        dict(SIZES, num_key_value_heads=2, rms_norm_eps=1e-6,
             rope_parameters=dict(rope_type="default", rope_theta=500_000.0))),
    "granite": Same(  # muP divides the logits as Granite does
        "llama", dict(norm_eps=1e-6, embedding_scale=3.0, attn_scale=0.4, residual_scale=0.3, init="mup",
                      mup_base_width=12), "granite",
        dict(SIZES, embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.3, logits_scaling=4.0)),
    "neox": Same("neox", dict(rope_fraction=0.5), "gpt_neox",
                 dict(SIZES, hidden_act="gelu", rotary_pct=0.5)),
    "phi": Same(
        "neox", dict(parallel_block="one_norm", activation="gelu_tanh", rope_fraction=0.5, head_bias=True), "phi",
        dict(SIZES, partial_rotary_factor=0.5)),
    "bloom": Same(
        "gpt2_openai", dict(position_encoding="alibi", embedding_norm=True, d_ff=192), "bloom",
        dict(vocab_size=61, hidden_size=48, n_layer=2, n_head=4)),
    "falcon": Same(
        "custom", dict(normalization="layernorm", parallel_block="one_norm", position_encoding="rope", n_kv_head=1),
        "falcon", dict(vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=128,
                       multi_query=True, parallel_attn=True, bias=False, alibi=False, tie_word_embeddings=True)),
    "gpt2_openai": Same(
        "gpt2_openai", dict(), "gpt2",
        dict(n_layer=2, n_head=4, n_embd=48, vocab_size=61, n_positions=24, n_inner=128, resid_pdrop=0.0,
             embd_pdrop=0.0, attn_pdrop=0.0)),
}


@pytest.mark.parametrize("name", SAME)
def test_a_preset_is_its_family_in_transformers(name):
    """tests/huggingface/ compares logits and gradients of what is read from a config.json; this is what is read."""
    f = SAME[name]
    config = transformers.AutoConfig.for_model(f.model_type, **f.hf_keys).to_dict()
    imported, _ = read_keys(FAMILIES[f.model_type], config)
    context = {"block_size": TINY["block_size"]}  # BLOOM has none
    expected = effective_keys(ModelConfig(**imported | context))
    found = effective_keys(get_preset(f.preset, **TINY | {"d_ff": 128} | f.keys))
    assert differing_keys(found, expected) == []


RELEASED = {  # model: (parameters, preset, sizes and other keys)
    "GPT-2": (124_439_808, "gpt2_openai",
              dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024)),
    "Llama-2-7B": (6_738_415_616, "llama",
                   dict(n_layer=32, n_head=32, n_embd=4096, d_ff=11008, vocab_size=32000, block_size=4096)),
    "Llama-3-8B": (8_030_261_248, "llama3",
                   dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, d_ff=14336, vocab_size=128256,
                        block_size=8192)),
    "Llama-3.2-1B": (1_235_814_400, "llama3",
                     dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, d_ff=8192, vocab_size=128256,
                          block_size=131072, rope_scaling="llama3", rope_scaling_factor=32.0,
                          rope_original_context=8192, weight_tying=True)),
    "Mistral-7B-v0.1": (7_241_732_096, "llama",
                        dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, d_ff=14336, vocab_size=32000,
                             block_size=32768, sliding_window=4096)),
    "SmolLM2-135M": (134_515_008, "llama",
                     dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, d_ff=1536, vocab_size=49152, block_size=8192,
                          rope_theta=100_000.0, weight_tying=True)),
    "Pythia-160M": (162_322_944, "neox",
                    dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, block_size=2048)),
    "Qwen2.5-0.5B": (494_032_768, "llama",
                     dict(n_layer=24, n_head=14, n_kv_head=2, n_embd=896, d_ff=4864, vocab_size=151936,
                          block_size=32768, rope_theta=1_000_000.0, norm_eps=1e-6, qkv_bias=True, weight_tying=True)),
    "Qwen2.5-7B": (7_615_616_512, "llama",
                   dict(n_layer=28, n_head=28, n_kv_head=4, n_embd=3584, d_ff=18944, vocab_size=152064,
                        block_size=131072, rope_theta=1_000_000.0, norm_eps=1e-6, qkv_bias=True)),
    "Qwen3-0.6B": (596_049_920, "qwen3",
                   dict(n_layer=28, n_head=16, n_kv_head=8, n_embd=1024, head_dim=128, d_ff=3072, vocab_size=151936,
                        block_size=40960)),
    "Gemma-7B": (8_537_680_896, "gemma2",
                 dict(n_layer=28, n_head=16, n_embd=3072, head_dim=256, d_ff=24576, vocab_size=256000, block_size=8192,
                      norm_position="pre", attn_softcap=None, logit_softcap=None, sliding_window=None)),
    "Gemma-2-2B": (2_614_341_888, "gemma2",
                   dict(n_layer=26, n_head=8, n_kv_head=4, n_embd=2304, head_dim=256, d_ff=9216, vocab_size=256000,
                        block_size=8192)),
    "OLMo-2-7B": (7_298_617_344, "olmo2",
                  dict(n_layer=32, n_head=32, n_embd=4096, d_ff=11008, vocab_size=100352, block_size=4096)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_its_parameter_count(name):
    parameters, preset, keys = RELEASED[name]
    with torch.device("meta"):
        model = build_model(get_preset(preset, **keys))
    counts = model.parameter_counts()["total"], count_parameters(model.config)
    assert counts == (parameters, parameters) and sum(p.numel() for p in model.parameters()) == parameters
