"""Reading a checkpoint: formats of files, nothing dropped silently, refusals in one line."""

import json
import shutil

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file

from blockgpt.errors import CheckpointError, UserError
from blockgpt.huggingface import hub, read
from blockgpt.huggingface.families import FAMILIES


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{family: a saved checkpoint}, in float32."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for family in ("llama", "gpt2", "gpt_neox"):
        model = tiny.reference_model(family, next(iter(tiny.CHECKPOINTS[family]))).float()
        found[family] = tiny.save(model, folder / family)
    return found


@pytest.fixture
def llama(sources, tmp_path):
    return shutil.copytree(sources["llama"], tmp_path / "llama")


def edit_tensors(directory, change):
    """Change the tensors {name: tensor} of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory, **keys):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return directory


def refused(directory, action=tiny.load):
    """The message with which a checkpoint is refused, on one line."""
    with pytest.raises(UserError) as raised:
        action(directory)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def state(directory):
    return dict(tiny.load(directory)[0].named_parameters())


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_shards_and_a_pickle_hold_the_same_parameters(llama, tmp_path):
    expected = state(llama)
    tensors = load_file(llama / "model.safetensors")
    sharded, pickled = shutil.copytree(llama, tmp_path / "sharded"), shutil.copytree(llama, tmp_path / "pickled")
    for folder in (sharded, pickled):
        (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-{i:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, sharded / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal_states(state(sharded), expected)
    torch.save(tensors, pickled / "pytorch_model.bin")
    model, weights = tiny.load(pickled)
    assert equal_states(dict(model.named_parameters()), expected)
    assert len(weights.files.warnings) == 1 and "weights-only" in weights.files.warnings[0]
    (sharded / next(iter(files))).unlink()
    assert "lists 'model-00000-of-00003.safetensors', which is not in the folder" in refused(sharded)


def test_a_pickle_that_runs_code_is_refused(llama):
    class Malicious:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    (llama / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Malicious()}, llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights-only loader refuses it"):
        tiny.load(llama)


def test_a_checkpoint_of_the_base_model_lacks_the_prefix(sources, tmp_path):
    gpt2 = shutil.copytree(sources["gpt2"], tmp_path / "gpt2")
    expected = state(gpt2)

    def as_released(tensors):  # with the mask, too, as OpenAI's files on the hub
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit_tensors(gpt2, as_released)
    model, weights = tiny.load(gpt2)
    assert equal_states(dict(model.named_parameters()), expected)
    assert weights.unused == {"transformer.h.0.attn.bias": "a constant",
                              "lm_head.weight": "equals transformer.wte.weight, to which it is tied"}
    edit_tensors(gpt2, lambda tensors: tensors["lm_head.weight"].add_(1.0))
    assert "lm_head.weight differs from transformer.wte.weight" in refused(gpt2)


def test_no_tensor_is_dropped_and_no_parameter_is_left(llama):
    edit_tensors(llama, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
    assert "has the tensor model.layers.0.mlp.extra.weight, for which the model has no place" in refused(llama)
    edit_tensors(llama, lambda tensors: tensors.pop("model.layers.0.mlp.extra.weight"))
    edit_tensors(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))
    assert "model.norm.weight has shape (47,), by config.json it has (48,)" in refused(llama)
    edit_tensors(llama, lambda tensors: tensors.pop("model.norm.weight"))
    assert "has no tensor model.norm.weight" in refused(llama)


@pytest.mark.parametrize("dtype, name", [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"),
                                         (torch.float8_e8m0fnu, "F8_E8M0"), (torch.uint16, "U16")])
def test_quantised_tensors_are_refused_before_one_is_read(llama, monkeypatch, dtype, name):
    edit_tensors(llama, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    monkeypatch.setattr(read.TensorFiles, "read", None)
    assert f"model.norm.weight is of {name}: quantised weights" in refused(llama)
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert "quantised weights" in refused(llama)


def test_a_smaller_context_takes_the_first_positions(sources):
    model, weights = tiny.load(sources["gpt2"], block_size=10)
    whole = state(sources["gpt2"])["position.embedding.weight"]
    assert torch.equal(model.position.embedding.weight, whole[:10])
    assert weights.unused == {"transformer.wpe.weight": "rows 10 to 23: beyond block_size"}


@pytest.mark.parametrize("keys, message", [
    (dict(model_type="t5"), "t5 is an encoder-decoder; no objective here trains one (supported: llama, mistral, "),
    (dict(model_type="bart"), "bart is an encoder-decoder"),
    (dict(model_type="bert"), "bert is a bidirectional encoder"),
    (dict(architectures=["LlamaForMaskedLM"]), "LlamaForMaskedLM is a bidirectional encoder"),
    (dict(model_type="mixtral"), "mixtral is a mixture of experts"),
    (dict(model_type="deepseek_v3"), "multi-head latent attention"),
    (dict(model_type="gemma3"), "a vision encoder (only the text models"),
    (dict(num_local_experts=8), "num_local_experts is set: a mixture of experts"),
    (dict(kv_lora_rank=64), "kv_lora_rank is set: multi-head latent attention"),
    (dict(quantization_config={"bits": 4}), "quantised weights (use the checkpoint that they were made from)"),
    (dict(model_type="gptj"), "model_type 'gptj' is not supported (supported: llama, mistral, "),
    (dict(model_type=None), "model_type None is not supported"),
    (dict(hidden_act="quick_gelu"), "hidden_act: 'quick_gelu' is not supported (only silu, "),
    (dict(is_causal=False), "is_causal is False: a bidirectional encoder"),
    (dict(is_causal=None), "is_causal is None: a bidirectional encoder"),  # as transformers reads it
    (dict(clip_qkv=8.0), "clip_qkv: 8.0 is not known for llama: it may change what the model computes (delete it "),
    (dict(num_key_value_head=8), "is not known for llama: it may change what the model computes (did you mean "
                                 "num_key_value_heads?)"),
    (dict(is_llama_config=5), "is_llama_config: 5 is not known for llama"),
    (dict(activation="geglu"), "activation: 'geglu' is not known for llama"),
    (dict(rope_parameters=dict(rope_type="longrope", factor=2.0)), "rope_scaling: 'longrope' is not supported"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_scaling: 'dynamic' is not supported"),
    (dict(rope_scaling=dict(type="linear", factor="two")), "rope_parameters: cannot be read (ValueError)"),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, beta_fast=16)), "beta_fast is not 32"),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, mscale=0.7)), "rope_scaling: mscale is not supported for yarn"),
    (dict(rope_scaling=dict(type="llama3", factor=2.0, low_freq_factor=2.0)), "low_freq_factor is not 1"),
    (dict(attention_bias=True), "attention_bias: True with no biases in the FFN is not supported"),
    (dict(attention_dropout=[0.1]), "attention_dropout: [0.1] is not a number"),
    (dict(architectures=7, clip_qkv=8.0), "clip_qkv: 8.0 is not known"),
])
def test_what_cannot_be_represented_is_one_line(llama, keys, message):
    assert message in refused(edit_config(llama, **keys), read.architecture)


@pytest.mark.parametrize("family, keys, message", [
    ("phi3", dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0], long_factor=[2.0])),
     "rope_scaling: 'longrope' is not supported (only default, linear, llama3, yarn)"),
    ("phi3", dict(rope_scaling=dict(type="su", short_factor=[1.0], long_factor=[2.0])), "rope_scaling: 'su'"),
    ("phi3", dict(rope_scaling=dict(type="linear", factor=2.0)), "linear is not supported for this family"),
    ("qwen2", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope_scaling: 'dynamic' is not supported"),
    ("gemma3_text", dict(rope_parameters=dict(full_attention=dict(rope_type="dynamic", factor=2.0))), "'dynamic'"),
    ("falcon", dict(alibi=True), "alibi: True is not supported (Falcon divides the bias by sqrt(head_dim), too)"),
    ("opt", dict(do_layer_norm_before=False), "do_layer_norm_before: False is not supported"),
    ("opt", dict(word_embed_proj_dim=512), "word_embed_proj_dim: 512 is not supported (only hidden_size, 768)"),
    ("cohere", dict(use_qk_norm=True), "use_qk_norm: True is not supported"),
    ("stablelm", dict(qk_layernorm=True), "qk_layernorm: True is not supported"),
    ("phi", dict(qk_layernorm=True), "qk_layernorm: True is not supported"),
    *((family, dict(attention_bias=True), "attention_bias: True with no biases in the FFN is not supported")
      for family in ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite")),
    *((family, dict(attention_bias=True), "attention_bias: True is not supported")
      for family in ("olmo2", "olmo3", "phi3", "cohere")),
    ("llama", dict(mlp_bias=True), "attention_bias: False with biases in the FFN is not supported"),
])
def test_what_a_family_cannot_have_here_is_refused_by_name(tmp_path, family, keys, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **keys}))
    assert message in refused(tmp_path, read.architecture)


def test_smollm3s_layers_without_rope_are_those_of_its_list_or_every_fourth(llama):
    edit_config(llama, model_type="smollm3", num_hidden_layers=8)
    assert read.architecture(llama)[0]["rope_pattern"] == "RRRN"
    assert read.architecture(edit_config(llama, no_rope_layers=[0, 1] * 4))[0]["rope_pattern"] == "NR"
    for wrong in ([1, 0], [2] * 8):
        assert "no_rope_layers: [" in refused(edit_config(llama, no_rope_layers=wrong), read.architecture)


def test_keys_of_both_versions_of_transformers_are_read(llama):
    new = read.architecture(edit_config(llama, rope_parameters=dict(
        rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)))[0]
    old = read.architecture(edit_config(llama, rope_parameters=None, rope_theta=5e5, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)))[0]
    assert new == old and new["rope_theta"] == 5e5 and new["rope_original_context"] == 8192


def test_dropouts_that_differ_are_named(llama):
    keys, notes = read.architecture(edit_config(llama, attention_dropout=0.1))
    assert keys["dropout"] == 0.0 and notes[0].startswith("dropout is 0, not attention_dropout=0.1")


def test_a_folder_is_told_from_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.checkpoint_directory(f"hf:{tmp_path}") == tmp_path
    with pytest.raises(UserError, match=r"hf:\./x: there is no folder \./x, and it is no name on the Hugging Face hub"):
        hub.checkpoint_directory("hf:./x")
    with pytest.raises(UserError, match=r"hf:Org/Name@main: cannot be had from the Hugging Face hub: .* works offline"):
        hub.checkpoint_directory("hf:Org/Name@main")


def test_a_name_in_the_cache_is_opened_offline(sources, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--Org--Tiny"
    shutil.copytree(sources["llama"], folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    (folder / "refs/v1").write_text(commit)
    for name in ("hf:Org/Tiny", "hf:Org/Tiny@v1", f"hf:Org/Tiny@{commit}"):
        assert hub.checkpoint_directory(name, weights=True).name == commit


def test_every_family_names_its_head_and_its_embedding():
    for family in FAMILIES.values():
        assert sum(rule.ours == ("lm_head",) for rule in family.tensors) == 1
        assert sum(rule.ours == ("token_embedding",) for rule in family.tensors) == 1
