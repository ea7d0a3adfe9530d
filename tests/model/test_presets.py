"""Whole models: each preset against the same family in transformers, and the released models' parameter counts."""

import re
import typing

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import count_parameters
from parity import TINY, randomised

from model_builder import build_model
from model_config import get_preset


class Family(typing.NamedTuple):
    """A preset with keys, and the configuration in transformers that is the same model.

    preset, keys: of this project.
    hf_config: the prefix of transformers' configuration class; hf_keys: its arguments.
    names: {substring of a parameter's name here: in transformers}, replaced one after the other.
    fused: the name of the matrix that holds queries, keys and values in transformers, if they are one matrix.
    split: (fused weight or bias, 0 | 1 | 2) -> that of queries, keys or values.
    transposed: whether transformers stores the matrices transposed.
    rtol: transformers computes norms, angles and softmax in float32 whatever the dtype of the model.
    """

    preset: str
    keys: dict
    hf_config: str
    hf_keys: dict
    names: dict
    fused: str | None = None
    split: typing.Callable | None = None
    transposed: bool = False
    rtol: float = 1e-5


LLAMA = {"blocks.": "model.layers.", "token_embedding": "model.embed_tokens", "final_norm": "model.norm",
         "attn_residual.norm.": "input_layernorm.", "ffn_residual.norm.": "post_attention_layernorm.",
         "attn.qk_norm.": "attn.", "attn.": "self_attn.", "ffn.": "mlp."}
GEMMA = {"attn_residual.norm_after": "post_attention_layernorm",
         "ffn_residual.norm_after": "post_feedforward_layernorm", **LLAMA,
         "ffn_residual.norm.": "pre_feedforward_layernorm."}
OLMO = {**LLAMA, "attn_residual.norm.": "post_attention_layernorm.",
        "ffn_residual.norm.": "post_feedforward_layernorm."}
PHI = {**LLAMA, "o_proj": "dense", "final_norm": "model.final_layernorm", "up_proj": "fc1", "down_proj": "fc2"}
NEOX = {"blocks.": "gpt_neox.layers.", "token_embedding": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm", "attn_residual.norm": "input_layernorm",
        "ffn_residual.norm": "post_attention_layernorm", "attn.": "attention.", "o_proj": "dense", "ffn.": "mlp.",
        "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"}
BLOOM = {"blocks.": "transformer.h.", "token_embedding": "transformer.word_embeddings",
         "embedding_norm": "transformer.word_embeddings_layernorm", "final_norm": "transformer.ln_f",
         "attn_residual.norm": "input_layernorm", "ffn_residual.norm": "post_attention_layernorm",
         "attn.": "self_attention.", "o_proj": "dense", "ffn.": "mlp.", "up_proj": "dense_h_to_4h",
         "down_proj": "dense_4h_to_h"}
GPT2 = {"blocks.": "transformer.h.", "token_embedding": "transformer.wte", "position.embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f", "attn_residual.norm": "ln_1", "ffn_residual.norm": "ln_2",
        "ffn.up_proj": "mlp.c_fc", "ffn.down_proj": "mlp.c_proj", "attn.o_proj": "attn.c_proj"}


def thirds(fused, i):
    """All heads' queries, then keys, then values, along the last dimension."""
    return fused.chunk(3, dim=-1)[i]


def by_head(fused, i):
    """Queries, keys and values of one head after the other."""
    return fused.unflatten(0, (TINY["n_head"], 3, -1))[:, i].flatten(0, 1)


def multi_query(fused, i):
    """All heads' queries, then the one key and value."""
    head = TINY["n_embd"] // TINY["n_head"]
    return fused.split((TINY["n_embd"], head, head))[i]


SIZES = dict(vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
             max_position_embeddings=24, pad_token_id=None)
YARN = dict(factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0)
FAMILIES = {
    "llama": Family("llama", dict(), "Llama", dict(SIZES, rms_norm_eps=1e-5, rope_theta=10000.0), LLAMA),
    "llama, tied, grouped": Family(
        "llama", dict(n_kv_head=2, weight_tying=True), "Llama",
        dict(SIZES, rms_norm_eps=1e-5, num_key_value_heads=2, tie_word_embeddings=True), LLAMA),
    "llama with biases and yarn": Family(
        "llama", dict(bias=True, rope_scaling="yarn", rope_scaling_factor=4.0, rope_original_context=16), "Llama",
        dict(SIZES, rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True,
             rope_parameters=dict(YARN, rope_type="yarn", rope_theta=10000.0)), LLAMA),
    "llama3": Family(
        "llama3", dict(n_kv_head=2, rope_scaling="llama3", rope_scaling_factor=4.0, rope_original_context=16), "Llama",
        dict(SIZES, rms_norm_eps=1e-5, num_key_value_heads=2,
             rope_parameters=dict(LLAMA3, rope_type="llama3", rope_theta=500_000.0)), LLAMA),
    "qwen3": Family(
        "qwen3", dict(n_kv_head=2, head_dim=20), "Qwen3",
        dict(SIZES, num_key_value_heads=2, head_dim=20, rms_norm_eps=1e-6, tie_word_embeddings=True,
             rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0)), LLAMA),
    "qwen2": Family(
        "llama", dict(n_kv_head=2, qkv_bias=True, rope_theta=1_000_000.0, norm_eps=1e-6), "Qwen2",
        dict(SIZES, num_key_value_heads=2, rms_norm_eps=1e-6,
             rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0)), LLAMA),
    "mistral": Family(
        "llama", dict(n_kv_head=2, sliding_window=7), "Mistral",
        dict(SIZES, num_key_value_heads=2, rms_norm_eps=1e-5, sliding_window=7), LLAMA),
    "gemma": Family(
        "gemma2", dict(n_kv_head=1, head_dim=20, norm_position="pre", sliding_window=None, attn_softcap=None,
                       logit_softcap=None), "Gemma",
        dict(SIZES, num_key_value_heads=1, head_dim=20, rms_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"), LLAMA),
    "gemma2": Family(  # softcaps and window small enough to matter, a scale other than both defaults
        "gemma2", dict(n_kv_head=2, head_dim=20, sliding_window=5, attn_scale=9**-0.5, attn_softcap=0.5,
                       logit_softcap=1.5), "Gemma2",
        dict(SIZES, num_key_value_heads=2, head_dim=20, sliding_window=5, query_pre_attn_scalar=9,
             attn_logit_softcapping=0.5, final_logit_softcapping=1.5), GEMMA),
    "gemma3, one layer in six global": Family(
        "gemma3", dict(n_layer=6, n_kv_head=1, head_dim=20, sliding_window=5), "Gemma3Text",
        dict(SIZES, num_hidden_layers=6, num_key_value_heads=1, head_dim=20, sliding_window=5,
             query_pre_attn_scalar=20), GEMMA),
    "gemma3, its global layers scaled": Family(
        "gemma3", dict(head_dim=20, sliding_window=5, window_pattern="SL", attn_scale=9**-0.5,
                       rope_scaling="linear", rope_scaling_factor=8.0), "Gemma3Text",
        dict(SIZES, num_key_value_heads=4, head_dim=20, sliding_window=5, query_pre_attn_scalar=9,
             layer_types=["sliding_attention", "full_attention"],
             rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=10_000.0),
                                  full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1_000_000.0))), GEMMA),
    "olmo2": Family(
        "olmo2", dict(n_kv_head=2), "Olmo2",
        dict(SIZES, num_key_value_heads=2, rms_norm_eps=1e-6,
             rope_parameters=dict(rope_type="default", rope_theta=500_000.0)), OLMO),
    "granite": Family(  # muP divides the logits as Granite does
        "llama", dict(norm_eps=1e-6, embedding_scale=3.0, attn_scale=0.4, residual_scale=0.3, init="mup",
                      mup_base_width=12), "Granite",
        dict(SIZES, embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.3, logits_scaling=4.0),
        LLAMA),
    "neox": Family("neox", dict(rope_fraction=0.5), "GPTNeoX",
                   dict(SIZES, hidden_act="gelu", rotary_pct=0.5), NEOX, "query_key_value", by_head),
    "phi": Family(
        "neox", dict(parallel_block="one_norm", activation="gelu_tanh", rope_fraction=0.5), "Phi",
        dict(SIZES, partial_rotary_factor=0.5), PHI),
    "bloom": Family(
        "gpt2_openai", dict(position_encoding="alibi", embedding_norm=True, d_ff=192), "Bloom",
        dict(vocab_size=61, hidden_size=48, n_layer=2, n_head=4), BLOOM, "query_key_value", by_head),
    "falcon": Family(
        "custom", dict(normalization="layernorm", parallel_block="one_norm", position_encoding="rope", n_kv_head=1),
        "Falcon", dict(vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=128,
                       multi_query=True, parallel_attn=True, bias=False, alibi=False, tie_word_embeddings=True),
        BLOOM, "query_key_value", multi_query),
    "gpt2_openai": Family(
        "gpt2_openai", dict(), "GPT2",
        dict(n_layer=2, n_head=4, n_embd=48, vocab_size=61, n_positions=24, n_inner=128, resid_pdrop=0.0,
             embd_pdrop=0.0, attn_pdrop=0.0), GPT2, "c_attn", thirds, transposed=True, rtol=1e-13),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_is_its_family_in_transformers(family):
    f = FAMILIES[family]
    config = getattr(transformers, f"{f.hf_config}Config")(**f.hf_keys, attn_implementation="eager")
    reference = randomised(transformers.AutoModelForCausalLM.from_config(config))
    hf_parameters = dict(reference.named_parameters())
    if "lm_head.bias" in hf_parameters:  # Phi's, which no preset has
        hf_parameters.pop("lm_head.bias").data.zero_()
    model = build_model(get_preset(f.preset, **TINY | {"d_ff": 128} | f.keys)).double().eval()

    def hf_tensor(name, state):
        """The tensor in {transformers' name: tensor} for the parameter `name` of this project."""
        for here, in_transformers in f.names.items():
            name = name.replace(here, in_transformers)
        if f.fused and (match := re.search("[qkv]_proj", name)):
            value = f.split(state[name.replace(match[0], f.fused)], "qkv".index(match[0][0]))
        else:
            value = state[name]
        matrix = re.search(r"(_proj|\.c_\w+)\.weight", name)
        return value.T if f.transposed and matrix else value

    with torch.no_grad():
        for name, p in model.named_parameters():
            value = hf_tensor(name, hf_parameters)
            assert p.shape == value.shape, name
            p.copy_(value)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in hf_parameters.values())
    idx = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(1))
    logits, loss = model(idx), model(idx, idx.roll(-1, 1))
    expected = reference(idx).logits
    torch.testing.assert_close(logits, expected, rtol=f.rtol, atol=f.rtol)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), idx.roll(-1, 1).flatten())
    # The loss is computed in float32, as under mixed precision.
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0.0)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = {n: q.grad for n, q in hf_parameters.items()}
    rotates = model.config.position_encoding == "rope"
    for name, p in model.named_parameters():
        grad = hf_tensor(name, gradients)
        if name.endswith("k_proj.bias") and not rotates:
            # It adds the same to all scores of a query, so its gradient is 0, and these are rounding errors.
            of_weight = hf_tensor(name.replace("bias", "weight"), gradients)
            assert max(p.grad.abs().max(), grad.abs().max()) <= f.rtol * of_weight.abs().max(), name
            continue
        largest = grad.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=f.rtol * largest,
                                   msg=lambda m, name=name: f"{name}: {m}")


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
