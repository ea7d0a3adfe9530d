"""model_builder: every combination builds and learns, from weights that depend on (seed, name) alone."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
import torch
import torch.nn.functional as F

from blockgpt.errors import ConfigError, UserError
from model_builder import build_model, load_weights, sample_token
from model_components import ResidualProjection
from model_config import AXES, PRESETS, ModelConfig, example_values, get_preset

TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3], [0] * 12])


@functools.cache  # seconds, that the selection of other tests need not spend
def all_pairs():
    return architectures.covering(at_least=200)


@pytest.mark.slow
def test_the_incompatible_pairs_of_values_are_the_documented_ones():
    activations = {(f, a) for f, option in AXES["ffn_type"].items() if option.implies for a in AXES["activation"]
                   if a not in option.implies["activation"]}
    expected = {(("activation", a), ("ffn_type", f)) for f, a in activations} | {
        (("norm_position", "post"), ("parallel_block", "two_norms")),
        (("attention_backend", "sdpa"), ("attn_softcap", 50.0)),
        (("attention_backend", "flex"), ("dropout", 0.1))}
    assert {frozenset(pair) for pair in all_pairs()[1]} == {frozenset(pair) for pair in expected}
    assert len(all_pairs()[0]) >= 200


@pytest.mark.slow
def test_parameters_of_all_pairs_of_options_follow_from_the_config_by_formula():
    for choice in all_pairs()[0]:
        with torch.device("meta"):
            model = build_model(ModelConfig(**architectures.TINY | choice))
        assert model.infer_config() == model.config, choice
        counts = model.parameter_counts()
        numel = sum(p.numel() for p in model.parameters())
        assert counts["total"] == counts["trainable"] == numel == architectures.count_parameters(model.config), choice
        tables = sum(p.numel() for name, p in model.named_parameters() if "embedding" in name and "norm" not in name)
        assert counts["non_embedding"] == numel - tables, choice


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 1, *(pytest.param(i, marks=pytest.mark.long) for i in range(2, 8))])
def test_all_pairs_of_options_run_forward_and_backward(chunk, untraced):
    idx = torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(chunk))
    for choice in all_pairs()[0][chunk::8]:
        model = build_model(ModelConfig(**architectures.TINY | choice))
        trains = not AXES["attention_backend"][choice["attention_backend"]].trains_on
        with torch.set_grad_enabled(trains):  # flex has no backward pass on a CPU
            logits, loss = model(idx, segment_ids=DOCUMENTS), model(idx, idx, segment_ids=DOCUMENTS)
        assert logits.shape == (2, 12, 48) and torch.isfinite(logits).all(), choice
        if trains:
            loss.backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), choice


# The keys that infer_config copies from the config; its docstring names them.
COPIED = {"arch_preset", "ffn_multiple_of", "init_std", "zero_init_residual", "mup_base_width", "attention_type"}
READ_BACK = {f.name for f in dataclasses.fields(ModelConfig)} - COPIED - {"kernels"}  # tests/kernels/triton_cases.py


def test_infer_config_reads_every_key_from_the_components_but_the_copied_ones():
    actual = ModelConfig(n_layer=3, n_embd=32, n_head=4, head_dim=10, n_kv_head=1, vocab_size=48, block_size=12,
                         d_ff=40, normalization="rmsnorm", norm_position="sandwich", parallel_block="two_norms",
                         activation="gelu_tanh", ffn_type="geglu", position_encoding="rope", rope_scaling="yarn",
                         attention_backend="manual", qk_norm="head", attn_gate="headwise", init="mup", bias=True,
                         qkv_bias=False, weight_tying=False, value_embeddings=1, x0_mix=True, embedding_norm=True,
                         norm_eps=1e-3, dropout=0.25, residual_scale=0.5, attn_softcap=5.0, logit_softcap=6.0,
                         sliding_window=5, window_pattern="SLS", rope_theta=77.0, rope_theta_local=55.0,
                         rope_pattern="RRN", rope_fraction=0.6, rope_scaling_factor=3.0, rope_original_context=7,
                         attn_scale=0.3, causal=False, mask_documents=True, embedding_scale=3.0,
                         logit_scale=0.5, head_bias=True, loss_chunk=9).resolve()
    declared = ModelConfig(n_layer=4, n_embd=16, n_head=2, vocab_size=7, block_size=5, qkv_bias=True).resolve()
    actual_flat, declared_flat = actual.flat(), declared.flat()
    assert all(actual_flat[key] != declared_flat[key] for key in READ_BACK)
    model = build_model(actual)
    model.config = declared  # as if keys had been lost between this config and the modules
    inferred = model.infer_config().flat()
    assert inferred == {key: (actual_flat if key in READ_BACK else declared_flat)[key] for key in actual_flat}


@pytest.mark.parametrize("name", PRESETS)
def test_infer_config_is_the_config_of_every_preset(name):
    config = get_preset(name, **TINY)
    assert build_model(config).infer_config() == config.resolve()


def test_infer_config_reads_modules_whose_class_fsdp_has_replaced():
    model = build_model(get_preset("neox", **TINY))
    for module in (*model.blocks, model):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    assert model.infer_config() == get_preset("neox", **TINY).resolve()


def overfits(choice):
    """Whether AdamW brings the loss of one batch from ln 64 = 4.16 below 1 within 200 steps."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**TINY, **choice))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    idx = torch.randint(0, 64, (2, 17))
    for step in range(200):
        for group in optimizer.param_groups:  # post-norm wants a warm-up
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10)
        loss = model(idx[:, :-1], idx[:, 1:])
        if loss.item() < 1.0:
            return True
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return False


# Values with which a model can memorise a batch at this learning rate.
LEARNABLE = dict(sliding_window=(None, 5), dropout=(0.0, 0.1), bias=(False, True), weight_tying=(False, True),
                 embedding_norm=(False, True), x0_mix=(False, True), value_embeddings=(0, 1),
                 zero_init_residual=(False, True), logit_softcap=(None, 30.0), attn_softcap=(None, 30.0))
LEARNING = {**{axis: architectures.SPACE[axis] for axis in AXES if axis in architectures.SPACE}, **LEARNABLE,
            "attention_backend": ("sdpa", "manual"), "rope_scaling": ("none",)}


def learnable(at_least=1, at_most=None):
    """Combinations that can memorise a batch.

    DyT has no statistics and does not scale up a small embedding. It gets embedding_scale=sqrt, as its authors do, and
    is left out with post-norm and as the norm of the embeddings, where about one seed in six does not get there.
    """
    choices = architectures.covering(LEARNING, at_least, at_most, mup_base_width=32)[0]
    return [c | ({"embedding_scale": "sqrt"} if c["normalization"] == "dyt" else {}) for c in choices
            if c["normalization"] != "dyt" or (c["norm_position"] != "post" and not c["embedding_norm"])]


@pytest.mark.grid(4)
@pytest.mark.parametrize("choice", learnable(at_most=24)[:16], ids=architectures.name)
def test_overfits_one_batch(choice):
    assert overfits(choice)


@pytest.mark.long
@pytest.mark.parametrize("chunk", range(16))
def test_every_combination_overfits_one_batch(chunk):
    for choice in learnable(at_least=400)[chunk::16]:
        assert overfits(choice), choice


@pytest.mark.parametrize("name", PRESETS)
def test_initialisation_is_gpt2s_and_covers_every_residual_projection(name):
    model = build_model(get_preset(name, n_layer=3, n_head=4, n_embd=256, vocab_size=512, block_size=256))
    residual = {f"{m}.weight" for m, module in model.named_modules() if isinstance(module, ResidualProjection)}
    assert {n for n, _ in model.named_parameters() if "down_proj.weight" in n or "o_proj.weight" in n} == residual
    assert len(residual) == 6
    zero_weight = model.config.normalization == "rmsnorm_gemma"  # 1 + weight
    for n, p in model.named_parameters():
        if p.dim() >= 2:
            expected = 0.02 / 6**0.5 if n in residual else 0.02
            assert abs(p.std().item() - expected) <= 0.03 * expected, n  # tens of thousands of draws
            assert abs(p.mean().item()) <= 0.03 * expected * 5
        elif "norm" in n:
            assert (p == (0.0 if n.endswith("bias") or zero_weight else 1.0)).all(), n


def test_shared_parameters_start_equal_across_architectures():
    gpt2, llama = (build_model(get_preset(n, **TINY, d_ff=64), seed=7) for n in ("gpt2", "llama"))
    a, b = dict(gpt2.named_parameters()), dict(llama.named_parameters())
    shared = [n for n in a.keys() & b.keys() if a[n].shape == b[n].shape]
    assert len(shared) >= 2 * 8
    assert all(torch.equal(a[n], b[n]) for n in shared)
    other = dict(build_model(get_preset("gpt2", **TINY, d_ff=64), seed=8).named_parameters())
    assert not torch.equal(a["token_embedding.weight"], other["token_embedding.weight"])


# Configurations in which to change each key.
BASES = {
    "gpt2": {}, "llama": {}, "neox": dict(rope_fraction=1.0), "olmo2": dict(norm_position="pre"),
    "custom": dict(normalization="dyt"),
    "gemma3": dict(sliding_window=4, window_pattern="SL", qk_norm="none", rope_scaling="yarn"),
    "qwen3": dict(rope_scaling="llama3", init="mup", sliding_window=3, qk_norm="none", d_ff=40),
}


def base_config(base, **overrides):
    return get_preset(base, **{**TINY, "n_head": 4, "block_size": 64, "init_std": 0.2, **BASES[base], **overrides})


@functools.cache
def fingerprint(config):
    """All that a key may change: parameters, classes, logits, learning rates, whether the loss is cut into chunks."""
    idx = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(0))  # longer than every window
    model = build_model(config)
    torch.manual_seed(0)  # of dropout
    logits = model(idx, segment_ids=torch.stack((torch.arange(48) // 7, torch.zeros(48, dtype=torch.long))))
    return ([(n, tuple(p.shape), p.sum().item()) for n, p in model.named_parameters()],
            [type(m) for m in model.modules()], logits.detach().numpy().tobytes(), model.lr_multipliers(),
            model.lm_head.loss(model.token_embedding(idx), idx).grad_fn.name().startswith("Nll"))


def changed(base, key):
    """The config of `base` with another value of `key`; None if the key cannot have another there."""
    now = getattr(base_config(base).resolve(), key)
    for value in (*example_values()[key], not now if isinstance(now, bool) else now):
        try:
            config = base_config(base, **{key: value})
        except ConfigError:
            continue
        if getattr(config.resolve(), key) != now:
            return config
    return None


@pytest.mark.grid(6)
@pytest.mark.parametrize("key", [key for key in example_values() if key != "arch_preset"])
@pytest.mark.parametrize("base", BASES)
def test_every_key_changes_the_model_or_is_reported_as_having_no_effect(base, key):
    config = changed(base, key)
    if key == "kernels":
        return  # auto is torch's on this device; see tests/kernels/triton_cases.py
    if config is None:
        assert key == "activation" and base_config(base).implied()["activation"] == ("silu",)
        return
    if key == "block_size" and config.position_encoding != "learned_absolute":
        return  # it is the length of the data's sequences, and changes no module
    assert (fingerprint(base_config(base)) == fingerprint(config)) == (key in config.unused_keys())


@pytest.mark.parametrize("mask_documents", [False, True])
def test_torch_is_asked_for_the_kernel_of_a_training_step(mask_documents, monkeypatch):
    """With the same arguments, apart from the number of sequences: masks, dtypes, and that gradients are needed."""
    model = build_model(get_preset("llama", **TINY, n_kv_head=1, sliding_window=4, window_pattern="SL", dropout=0.1,
                                   attention_backend="sdpa", mask_documents=mask_documents))
    queried, computed = [], []

    def recorded(calls, function):
        def call(q, k, v, attn_mask, **keywords):
            calls.append(([t.requires_grad for t in (q, k, v)], q.dtype, [t.shape[1:] for t in (q, k, v)],
                          None if attn_mask is None else (attn_mask.dtype, attn_mask.shape[1:]), keywords))
            return function(q, k, v, attn_mask=attn_mask, **keywords)
        return call

    monkeypatch.setattr(torch, "_fused_sdp_choice", recorded(queried, torch._fused_sdp_choice))
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded(computed, F.scaled_dot_product_attention))
    assert set(model.attention_kernels(torch.float32)) == {"4", "full"}
    idx = torch.zeros(2, TINY["block_size"], dtype=torch.long)
    model(idx, idx, segment_ids=torch.zeros_like(idx))
    assert queried == computed


@pytest.mark.grid(5)
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_generation_with_a_cache_equals_generation_without(name, kv_heads):
    torch.manual_seed(0)
    model = build_model(get_preset(name, **TINY, n_kv_head=kv_heads, init_std=0.3)).double()
    prompt = torch.randint(0, 64, (2, 5))
    with_cache = model.generate(prompt, 30, temperature=0, use_cache=True)  # past block_size too
    assert torch.equal(with_cache, model.generate(prompt, 30, temperature=0, use_cache=False))
    assert torch.equal(with_cache[:, :5], prompt) and with_cache.shape == (2, 35)
    longer = torch.randint(0, 64, (1, 40))
    assert model.generate(longer, 3).shape == (1, 43)


def test_generation_is_repeatable_stops_and_never_samples_padding():
    model = build_model(get_preset("llama", **TINY))
    prompt = torch.zeros(1, 1, dtype=torch.long)
    a, b = (model.generate(prompt, 20, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert model.generate(prompt, 60, vocab_size=5, generator=torch.Generator().manual_seed(0)).max() < 5
    stopped = model.generate(prompt, 500, vocab_size=4, stop=3, generator=torch.Generator().manual_seed(0))
    assert stopped[0, -1] == 3 and (stopped[0, :-1] != 3).all() and stopped.shape[1] < 501


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)

    def sampled(temperature=1.0, top_k=None, top_p=None):
        return set(sample_token(logits.clone(), temperature, top_k, top_p, None, generator).flatten().tolist())

    assert sampled() == {0, 1, 2, 3}
    assert sampled(top_k=2) == {0, 1}
    assert sampled(top_k=99) == {0, 1, 2, 3}
    assert sampled(top_p=0.5) == {0}
    assert sampled(top_p=0.6) == {0, 1}
    assert sampled(top_p=1.0) == {0, 1, 2, 3}
    assert sampled(temperature=0) == {0}


def test_weights_of_another_architecture_are_refused_and_change_nothing():
    model = build_model(get_preset("gpt2", **TINY))
    before = {n: p.clone() for n, p in model.named_parameters()}
    for other in (get_preset("llama", **TINY), get_preset("gpt2", **{**TINY, "vocab_size": 128})):
        with pytest.raises(UserError, match="somewhere"):
            load_weights(model, dict(build_model(other).named_parameters()), "somewhere")
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.slow
def test_a_new_norm_is_one_class_and_one_table_entry(tmp_path, data_dir):
    """The worked example of docs/ARCHITECTURE.md, applied to a copy of the project: no other change is needed."""
    root = Path(__file__).resolve().parents[2]
    for source in root.glob("*.py"):
        shutil.copy(source, tmp_path)
    shutil.copytree(root / "blockgpt", tmp_path / "blockgpt")
    example = (root / "docs/ARCHITECTURE.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(example.splitlines()) < 20
    cls, entry = example.split("# model_config.py, NORMALIZATION\n")
    with open(tmp_path / "model_components.py", "a") as f:
        f.write("\n\n" + cls)
    table = (tmp_path / "model_config.py").read_text()
    (tmp_path / "model_config.py").write_text(table.replace("NORMALIZATION = {\n", "NORMALIZATION = {\n" + entry, 1))
    code = f"""
import runpy, sys
from configurator import help_text, load_config
from model_builder import build_model
from blockgpt.accounting.flops import flops_per_token
config = load_config(["--normalization=scalenorm", "--n_layer=1"]).model
model = build_model(config)
assert "scalenorm" in help_text() and "-Scale-" in model.infer_config().arch_name()
assert model.parameter_counts()["total"] == sum(p.numel() for p in model.parameters())
assert flops_per_token(model, 8)["train"] > 0
assert config.unused_keys().get("norm_eps") is None
import torch
from blockgpt.accounting.memory import MemoryAccount
saved = MemoryAccount(build_model, config, torch.float32, gpu=False).saved_in("final_norm")
assert saved.per_sequence > 0
sys.argv = ["train.py", "--normalization=scalenorm", "--n_embd=32", "--n_layer=1", "--block_size=32",
            "--max_iters=30", "--eval_tokens=512", "--dataset=text", "--device=cpu", "--mfu_peak=1",
            "--data_dir={data_dir}", "--run_name=new"]
runpy.run_path("train.py", run_name="__main__")
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": ""})
    assert process.returncode == 0, process.stderr
    run = json.loads((tmp_path / "runs/new/run.json").read_text())
    assert run["arch_name"] == "1L-4H-32D-AbsPos-Scale-GELU-PreNorm"
    assert run["results"]["val_loss"] < 5.7  # from ln 320 = 5.77
