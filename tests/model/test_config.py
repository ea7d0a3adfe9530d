"""model_config: the option space, its validation, presets and architecture names."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockgpt.errors import ConfigError
from model_components import component
from model_config import (
    AXES,
    NAME_HEAD,
    NAME_OMITS,
    PRESETS,
    ModelConfig,
    example_values,
    get_preset,
    list_presets,
    short_number,
)

ROOT = Path(__file__).resolve().parents[2]

SIZE_124M = dict(n_layer=12, n_head=12, n_embd=768)


def test_architecture_names_of_gpt2_and_llama():
    assert get_preset("gpt2", **SIZE_124M).arch_name() == "12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm"
    assert get_preset("llama", **SIZE_124M).arch_name() == "12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm"


def test_architecture_name_lists_values_other_than_the_usual():
    unusual = get_preset("llama", **SIZE_124M, n_kv_head=4, d_ff=1000, head_dim=32, bias=True)
    assert unusual.arch_name() == "12L-12H4KV-768D-RoPE-RMS-SwiGLU-PreNorm-FF1000-Bias-HD32"
    assert get_preset("llama", **SIZE_124M, d_ff=2048).arch_name() == get_preset("llama", **SIZE_124M).arch_name()
    assert get_preset("gpt2", rope_theta=5.0).arch_name() == get_preset("gpt2").arch_name()  # gpt2 has no RoPE
    assert get_preset("gemma3", **SIZE_124M).arch_name() == (
        "12L-12H-768D-RoPE-RMS1-GEGLU-GELUtanh-Sandwich-eps1e-6-theta1M-local10k-QKNorm-SW512-SSSSSL-Tied-embsqrt")
    assert get_preset("gpt2", qkv_bias=True, weight_tying=False, dropout=0.1, init_std=0.01).arch_name().endswith(
        "-PostNorm-QKVBias-Untied-drop0.1-std0.01")
    assert get_preset("llama", bias=True, qkv_bias=False, init="mup", mup_base_width=128).arch_name().endswith(
        "-PreNorm-Bias-NoQKVBias-muP-base128")
    assert get_preset("llama", ffn_multiple_of=48).arch_name().endswith("-FF2064")
    yarn = get_preset("llama", rope_scaling="yarn")  # the original context follows from block_size, which names omit
    assert yarn.arch_name().endswith("-YaRN-ctx128") and dataclasses.replace(
        yarn, block_size=2048).arch_name().endswith("-YaRN-ctx256")


def test_numbers_in_a_name_are_short():
    expected = {1e6: "1M", 500_000.0: "500k", 2_500_000: "2500k", 10_000.0: "10k", 1000: "1000", 16_384: "16384",
                500.0: "500", 0.1: "0.1", 1e-6: "1e-6", 1e300: "1e300"}
    assert {value: short_number(value) for value in expected} == expected


@given(st.floats(min_value=1e-300), st.floats(min_value=1e-300))
def test_different_numbers_have_different_texts(a, b):
    assert (short_number(a) == short_number(b)) == (a == b)
    assert float(short_number(a).replace("k", "e3").replace("M", "e6")) == a


def test_no_two_presets_have_the_same_name():
    assert len({get_preset(name).arch_name() for name in PRESETS}) == len(PRESETS)


def test_every_key_is_in_the_name_or_in_the_list_of_omitted_keys():
    for f in dataclasses.fields(ModelConfig):
        appended = (f.name in AXES or bool(f.metadata["label"])) and f.name not in {*NAME_HEAD, *NAME_OMITS}
        assert [appended, f.name in NAME_HEAD, f.name in NAME_OMITS].count(True) == 1, f.name


def test_every_label_in_an_architecture_name_is_different():
    labels = [f.metadata["label"] for f in dataclasses.fields(ModelConfig) if f.metadata["label"]]
    labels = [word for label in labels for word in label.split("{")[0].split("|")]
    labels = [label for label in labels if label]  # the values of the two patterns are their labels, of other letters
    options = [o.label for axis, table in AXES.items() if axis not in NAME_OMITS for o in table.values() if o.label]
    assert len(set(labels + options)) == len(labels + options)
    for axis in AXES.keys() - NAME_OMITS.keys():
        assert [o.label for o in AXES[axis].values()].count("") <= 1, axis


SIZES = {"n_layer": (3, 5), "n_head": (4, 2), "n_embd": (32, 48), "mup_base_width": (16, 24)}


def named_keys(config):
    """The values that a name must tell apart: of the keys that the model reads and names do not omit."""
    full = config.resolve()
    return tuple((key, value) for key, value in full.flat().items()
                 if key not in NAME_OMITS and key not in full.unused_keys())


@pytest.mark.slow
def test_two_configs_have_the_same_name_only_if_they_are_the_same_architecture():
    """Over the covering array: each choice, and each with one key changed."""
    names, space = {}, {**architectures.SPACE, **SIZES}
    changed = set()
    for i, choice in enumerate(architectures.covering()[0]):
        neighbours = [choice | {key: value} for key, values in space.items() for value in values]
        for neighbour in (choice, *(neighbours if i % 10 == 0 else ())):
            if architectures.builds(neighbour):
                config = ModelConfig(**architectures.TINY | neighbour)
                name, keys = config.arch_name(), named_keys(config)
                assert names.setdefault(name, keys) == keys, name
                changed |= {key for key in neighbour if neighbour[key] != choice.get(key, space[key][0])
                            and name != ModelConfig(**architectures.TINY | choice).arch_name()}
    assert len(set(names.values())) == len(names)  # and the same architecture always has the same name
    assert space.keys() - NAME_OMITS.keys() <= changed  # every other key changed some name


@pytest.mark.parametrize("n_embd, ffn_type, d_ff", [
    (768, "standard", 3072), (768, "swiglu", 2048), (128, "swiglu", 384), (100, "standard", 400),
    (4096, "swiglu", 10944),
])
def test_default_ffn_width(n_embd, ffn_type, d_ff):
    assert ModelConfig(n_embd=n_embd, n_head=4, ffn_type=ffn_type).resolve().d_ff == d_ff


def test_explicit_keys_override_the_preset():
    config = get_preset("gpt2", normalization="rmsnorm", weight_tying=False)
    assert (config.normalization, config.weight_tying, config.norm_position) == ("rmsnorm", False, "post")


def test_a_presets_activation_is_dropped_with_an_ffn_that_implies_another():
    assert get_preset("gpt2", ffn_type="swiglu").resolve().activation == "silu"


def test_resolving_twice_changes_nothing():
    for name in PRESETS:
        once = get_preset(name).resolve()
        assert once.resolve() == once
        derived = {k for k in once.derived() if getattr(once, k) in (None, "auto")}
        assert not derived


@pytest.mark.parametrize("key, overrides", [
    ("n_head", dict(n_head=5)),
    ("n_kv_head", dict(n_kv_head=5)),
    ("n_kv_head", dict(n_kv_head=24)),
    ("activation", dict(ffn_type="swiglu", activation="relu")),
    ("normalization", dict(normalization="rms")),
    ("normalization", dict(normalization=None)),
    ("position_encoding", dict(position_encoding="rope", n_embd=60, n_head=12)),
    ("dropout", dict(dropout=1.0)),
    ("dropout", dict(dropout=-0.1)),
    ("dropout", dict(dropout="0.1")),
    ("dropout", dict(dropout=float("nan"))),
    ("norm_eps", dict(norm_eps=0.0)),
    ("rope_theta", dict(rope_theta=float("inf"))),
    ("n_layer", dict(n_layer=0)),
    ("n_layer", dict(n_layer=2.0)),
    ("n_layer", dict(n_layer=True)),
    ("bias", dict(bias=1)),
    ("vocab_size", dict(vocab_size=0)),
    ("attention_backend", dict(attention_backend="sdpa", attn_softcap=5.0)),
    ("attention_backend", dict(attention_backend="flex", dropout=0.1)),
    ("attention_backend", dict(attention_backend=None)),
    ("position_encoding", dict(position_encoding="rope", rope_fraction=0.01)),
    ("position_encoding", dict(position_encoding="rope", head_dim=12, rope_fraction=0.25)),
    ("rope_theta", dict(rope_theta=1.0)),
    ("rope_scaling_factor", dict(rope_scaling_factor=0.5)),
    ("window_pattern", dict(window_pattern="SSG")),
    ("window_pattern", dict(window_pattern="")),
    ("rope_pattern", dict(rope_pattern="RX")),
    ("rope_pattern", dict(rope_pattern="NNNR", n_layer=3)),
    ("sliding_window", dict(sliding_window=0)),
    ("parallel_block", dict(parallel_block="two_norms", norm_position="post")),
    ("value_embeddings", dict(value_embeddings=7)),
    ("embedding_scale", dict(embedding_scale="sqr")),
    ("embedding_scale", dict(embedding_scale=0.0)),
    ("activation", dict(ffn_type="geglu", activation="silu")),
    ("attn_softcap", dict(attn_softcap=0.0)),
])
def test_an_invalid_config_is_refused_and_the_error_names_the_key(key, overrides):
    with pytest.raises(ConfigError) as error:
        get_preset("custom", **overrides)
    assert error.value.key == key
    assert str(error.value).startswith(f"{key}: ") and "\n" not in str(error.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean llama"):
        get_preset("lama")


def test_list_presets_prints_each_with_its_components(capsys):
    list_presets()
    printed = capsys.readouterr().out
    for name in PRESETS:
        assert f"\n{name} " in "\n" + printed
        assert get_preset(name).arch_name() in printed


def test_unused_keys_follow_the_axis_tables():
    assert "rope_theta" in get_preset("gpt2").unused_keys()
    llama = get_preset("llama").unused_keys()
    assert "rope_theta" not in llama and "norm_eps" not in llama and "rope_scaling" not in llama
    assert llama["rope_scaling_factor"] == "only rope_scaling=linear or llama3 or yarn reads it, and this is none"
    assert "rope_scaling_factor" in get_preset("gpt2", rope_scaling="yarn").unused_keys()
    assert "norm_eps" in get_preset("llama", normalization="dyt").unused_keys()
    assert "window_pattern" in llama and "window_pattern" not in get_preset("gemma2").unused_keys()
    assert "sliding_window" in get_preset("gemma2", window_pattern="L").unused_keys()
    assert "rope_theta" in get_preset("gemma3", window_pattern="S").unused_keys()


def test_layers_take_their_window_and_their_table_of_value_embeddings():
    config = ModelConfig(n_layer=7, sliding_window=8, window_pattern="SSL", value_embeddings=2)
    assert [config.window(i) for i in range(7)] == [8, 8, None, 8, 8, None, 8]
    assert [config.value_table(i) for i in range(7)] == [0, 1, None, None, None, 1, 0]
    assert [ModelConfig(n_layer=2, value_embeddings=1).value_table(i) for i in range(2)] == [0, 0]


def test_auto_takes_the_first_backend_that_supports_the_other_keys():
    assert ModelConfig().resolve().attention_backend == "sdpa"
    assert ModelConfig(attn_softcap=5.0).resolve().attention_backend == "manual"
    assert ModelConfig(attn_softcap=5.0, attention_backend="flex").resolve().attention_backend == "flex"
    assert ModelConfig(attn_softcap=5.0, dropout=0.1).supported_backends() == ["manual"]


@pytest.mark.parametrize("keys, cpu, cuda", [
    (dict(), "sdpa", "sdpa"),
    (dict(dropout=0.1), "sdpa", "sdpa"),
    (dict(sliding_window=1024), "sdpa", "sdpa"),  # no layer sees less than the context of 1024
    (dict(sliding_window=1023), "sdpa", "flex"),
    (dict(sliding_window=8, window_pattern="L"), "sdpa", "sdpa"),
    (dict(position_encoding="alibi"), "sdpa", "flex"),
    (dict(mask_documents=True), "sdpa", "flex"),
    (dict(attn_softcap=50.0), "manual", "flex"),
    (dict(attn_softcap=50.0, mask_documents=True, sliding_window=8), "manual", "flex"),
    (dict(attn_softcap=50.0, dropout=0.1), "manual", "manual"),
    (dict(sliding_window=8, dropout=0.1), "sdpa", "sdpa"),
], ids=str)
def test_auto_takes_a_backend_that_needs_no_scores_in_memory_where_there_is_one(keys, cpu, cuda):
    config = ModelConfig(**keys)
    assert [config.resolve(device).attention_backend for device in ("cpu", "mps", "cuda")] == [cpu, cpu, cuda]
    config.check_trainable_on("cpu")
    config.check_trainable_on("cuda")


def test_the_readmes_table_names_every_option():
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("## The options")[2].partition("## ")[0]
    options = {f.name: set(f.metadata["choices"] or ()) for f in dataclasses.fields(ModelConfig)}
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^;|]*)", table, re.MULTILINE))
    assert {axis: set(re.findall(r"`(\w+)`", row)) for axis, row in rows.items()} == {
        axis: options[axis] for axis in ("arch_preset", *AXES)}
    assert set(re.findall(r"`(\w+)`", table)) <= options.keys() | set().union(*options.values())


def test_every_key_has_another_value_that_is_accepted():
    for key, values in example_values().items():
        default = next(f.default for f in dataclasses.fields(ModelConfig) if f.name == key)
        others = [value for value in values if value != default]
        assert others and len(set(values)) == len(values), key
        for value in others:
            config = ModelConfig(**{key: value})
            assert getattr(config, key) == value and config != ModelConfig(), key


def test_every_option_names_a_class_of_its_own():
    for axis, table in AXES.items():
        classes = [option.load_class() for option in table.values()]
        assert all(isinstance(cls, type) for cls in classes) and len(set(classes)) == len(classes), axis
        assert [option.class_name for option in table.values()] == [cls.__name__ for cls in classes]


def test_an_option_added_to_a_table_is_accepted_and_built(monkeypatch):
    class Identity(torch.nn.Identity):
        pass

    monkeypatch.setitem(AXES["qk_norm"], "unit", AXES["qk_norm"]["none"]._replace(load_class=lambda: Identity))
    config = dataclasses.replace(ModelConfig(), n_layer=1)
    object.__setattr__(config, "qk_norm", "unit")  # `choices` were read when the class was defined
    assert component("qk_norm", config) is Identity


def test_torch_is_not_imported():
    code = ("import sys, model_config, configurator; configurator.load_config(['config/arch_llama.py']); "
            "model_config.list_presets(); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
