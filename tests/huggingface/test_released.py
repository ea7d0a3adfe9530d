"""The keys of config.json that released models have: read as transformers reads them, or refused by the command."""

import json

import pytest
import tiny_checkpoints as tiny
import transformers
from conftest import run_python

from blockgpt.errors import UserError
from tools import convert_hf

# What nearly all have, and what no model computes with.
COMMON = dict(bos_token_id=1, eos_token_id=2, initializer_range=0.02, torch_dtype="bfloat16", use_cache=True,
              transformers_version="4.40.2", tie_word_embeddings=False, attention_dropout=0.0)
LLAMA = dict(COMMON, architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=2048,
             intermediate_size=8192, max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=16,
             num_key_value_heads=8, rms_norm_eps=1e-5, vocab_size=32000, pretraining_tp=1)
LLAMA3 = dict(rope_type="llama3", factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
              original_max_position_embeddings=8192)
READ = {
    "CodeLlama 7B": dict(LLAMA, rope_theta=1000000, rope_scaling=None, vocab_size=32016),
    "Llama 3.2 1B": dict(LLAMA, attention_bias=False, mlp_bias=False, head_dim=64, rope_theta=500000.0,
                         rope_scaling=LLAMA3, tie_word_embeddings=True),
    "SmolLM2": dict(LLAMA, is_llama_config=True, rope_interleaved=False, rope_theta=100000, tie_word_embeddings=True,
                    **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
    "LLaMA 1": dict(LLAMA, max_sequence_length=2048, rms_norm_eps=1e-6),
    "GPT-NeoX 20B": dict(COMMON, architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox", hidden_act="gelu_fast",
                         attention_probs_dropout_prob=0, hidden_dropout_prob=0, hidden_size=6144,
                         intermediate_size=24576, layer_norm_eps=1e-5, max_position_embeddings=2048,
                         num_attention_heads=64, num_hidden_layers=44, rotary_emb_base=10000, rotary_pct=0.25,
                         vocab_size=50432),
    "StarCoder 2 3B": dict(COMMON, architectures=["Starcoder2ForCausalLM"], model_type="starcoder2",
                           activation_function="gelu", attention_softmax_in_fp32=True, embedding_dropout=0.0,
                           hidden_act="gelu_pytorch_tanh", hidden_size=3072, intermediate_size=12288,
                           layer_norm_epsilon=1e-5, max_position_embeddings=16384, mlp_type="default",
                           norm_epsilon=1e-5, norm_type="layer_norm", num_attention_heads=24, num_hidden_layers=30,
                           num_key_value_heads=2, residual_dropout=0.0, rope_theta=999999.4420358813,
                           scale_attention_softmax_in_fp32=True, scale_attn_weights=True, sliding_window=4096,
                           tie_word_embeddings=True, use_bias=True, vocab_size=49152),
}
SMALL = dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=61, head_dim=16, max_position_embeddings=tiny.CONTEXT, sliding_window=5)

MOE = dict(COMMON, hidden_act="silu", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
           num_hidden_layers=32, num_key_value_heads=8, num_experts_per_tok=2, output_router_logits=False,
           rms_norm_eps=1e-5, rope_theta=1e6, router_aux_loss_coef=0.02, vocab_size=32000)
REFUSED = {
    "Phi 3 mini 128K": (dict(
        COMMON, architectures=["Phi3ForCausalLM"], model_type="phi3", attention_bias=False, embd_pdrop=0.0,
        resid_pdrop=0.0, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, hidden_act="silu", hidden_size=3072,
        intermediate_size=8192, max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=32, original_max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
        rope_scaling=dict(type="longrope", long_factor=[1.07] * 48, short_factor=[1.1] * 48), sliding_window=262144,
        vocab_size=32064), "rope_scaling: 'longrope' is not supported (only default, linear, llama3, yarn)"),
    "Falcon RW 1B": (dict(
        COMMON, architectures=["FalconForCausalLM"], model_type="falcon", alibi=True, bias=True, hidden_dropout=0.0,
        apply_residual_connection_post_layernorm=False, hidden_size=2048, layer_norm_epsilon=1e-5, multi_query=False,
        new_decoder_architecture=False, num_attention_heads=32, num_hidden_layers=24, parallel_attn=False,
        vocab_size=50304), "alibi: True is not supported"),
    "OPT 350M": (dict(
        COMMON, architectures=["OPTForCausalLM"], model_type="opt", activation_dropout=0.0, activation_function="relu",
        do_layer_norm_before=False, dropout=0.1, ffn_dim=4096, hidden_size=1024, init_std=0.02, layerdrop=0.0,
        max_position_embeddings=2048, num_attention_heads=16, num_hidden_layers=24, prefix="</s>", vocab_size=50272,
        word_embed_proj_dim=512), "do_layer_norm_before: False is not supported (only True)"),
    "Mixtral": (dict(MOE, architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=8),
                "mixtral is a mixture of experts (supported: llama, "),
    "Qwen 2 57B-A14B": (dict(MOE, architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", num_experts=64,
                             moe_intermediate_size=2560, shared_expert_intermediate_size=20480),
                        "qwen2_moe is a mixture of experts (supported: llama, "),
    "DeepSeek V2 Lite": (dict(MOE, architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", kv_lora_rank=512,
                              q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, n_routed_experts=64,
                              v_head_dim=128), "deepseek_v2 is multi-head latent attention (supported: llama, "),
    "StableLM 2 12B": (dict(
        COMMON, architectures=["StableLmForCausalLM"], model_type="stablelm", hidden_act="silu", hidden_dropout=0.0,
        hidden_size=5120, intermediate_size=13824, layer_norm_eps=1e-5, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8, partial_rotary_factor=0.25,
        qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=False, vocab_size=100352),
        "qk_layernorm: True is not supported"),
    "GPT-J": (dict(
        COMMON, architectures=["GPTJForCausalLM"], model_type="gptj", activation_function="gelu_new", n_embd=4096,
        n_head=16, n_inner=None, n_layer=28, n_positions=2048, rotary=True, rotary_dim=64, vocab_size=50400),
        "model_type 'gptj' is not supported (supported: llama, "),
    "Yi, dynamic RoPE": (dict(LLAMA, rope_theta=5e6, rope_scaling=dict(type="dynamic", factor=4.0)),
                         "rope_scaling: 'dynamic' is not supported (only default, linear, llama3, yarn)"),
    "Gemma 3 4B": (dict(
        architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", image_token_index=262144,
        mm_tokens_per_image=256, text_config=dict(hidden_size=2560, model_type="gemma3_text", num_hidden_layers=34),
        vision_config=dict(hidden_size=1152, model_type="siglip_vision_model")),
        "gemma3 is a vision encoder (only the text models of the family work) (supported: llama, "),
    "T5 small": (dict(
        architectures=["T5ForConditionalGeneration"], model_type="t5", d_ff=2048, d_kv=64, d_model=512, num_heads=8,
        is_encoder_decoder=True, num_layers=6, vocab_size=32128), "t5 is an encoder-decoder; no objective here trains"),
    "Llama 3.2 1B, 4 bits": (dict(
        READ["Llama 3.2 1B"], unsloth_fixed=True, quantization_config=dict(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                                           quant_method="bitsandbytes")),
        "quantization_config is set: quantised weights (use the checkpoint that they were made from) (supported: "),
    "GTE Qwen 2": (dict(
        COMMON, architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", hidden_size=1536,
        intermediate_size=8960, is_causal=False, max_position_embeddings=131072, max_window_layers=21,
        num_attention_heads=12, num_hidden_layers=28, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6,
        sliding_window=131072, use_sliding_window=False, vocab_size=151646),
        "is_causal is False: a bidirectional encoder; no objective here trains one (supported: llama, "),
}


@pytest.mark.parametrize("name", READ)
def test_a_released_models_keys_are_read_as_transformers_reads_them(tmp_path, name):
    config = READ[name] | {key: value for key, value in SMALL.items() if key in READ[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with tiny.in_float64():
        reference = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path), attn_implementation="eager").double().eval()
        tiny.randomise(reference)
        tiny.save(reference, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config))  # as it was released
        model, _ = tiny.load(tmp_path)
        assert tiny.difference(model(tiny.tokens()), reference(tiny.tokens()).logits) < 1e-10


@pytest.mark.parametrize("name", REFUSED)
def test_a_released_model_that_cannot_be_represented_is_one_line_and_writes_nothing(tmp_path, name):
    config, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        convert_hf.main(["import", str(tmp_path), "--out", str(tmp_path / "out"), "--no-verify"])
    line = str(raised.value)
    assert line.startswith(f"{tmp_path}/config.json: {message}") and "\n" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_refusal_is_the_only_line_of_the_command_and_precedes_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REFUSED["T5 small"][0]))
    command = ("-X", "importtime", "-m", "tools.convert_hf", "import", tmp_path, "--out", tmp_path / "out")
    done = run_python(*command)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path}/config.json: t5 is an encoder-decoder")
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
