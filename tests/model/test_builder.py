"""model_builder: every combination builds and learns, from weights that depend on (seed, name) alone."""

import dataclasses
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

from blockgpt.errors import UserError
from model_builder import build_model, load_weights, sample_token
from model_components import ResidualProjection
from model_config import AXES, PRESETS, ModelConfig, get_preset

TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)
COVERING, IMPOSSIBLE = architectures.covering(at_least=200)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3], [0] * 12])


def test_what_cannot_stand_together_is_what_we_know_of():
    brings_its_own = {(f, a) for f, o in AXES["ffn_type"].items() if o.implies for a in AXES["activation"]
                      if a not in o.implies["activation"]}
    expected = {(("activation", a), ("ffn_type", f)) for f, a in brings_its_own} | {
        (("norm_position", "post"), ("parallel_block", "two_norms")),
        (("attention_backend", "sdpa"), ("attn_softcap", 5.0)),
        (("attention_backend", "flex"), ("dropout", 0.1))}
    assert {frozenset(p) for p in IMPOSSIBLE} == {frozenset(p) for p in expected}
    assert len(COVERING) >= 200


@pytest.mark.parametrize("part", range(8))
def test_all_pairs_of_options_build_and_run_forward_and_backward(part, untraced):
    idx = torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(part))
    for chosen in COVERING[part::8]:
        model = build_model(ModelConfig(**architectures.TINY | chosen))
        assert model.infer_config() == model.config, chosen
        counts = model.parameter_counts()
        assert counts["total"] == sum(p.numel() for p in model.parameters())
        trains = not AXES["attention_backend"][chosen["attention_backend"]].trains_on
        with torch.set_grad_enabled(trains):  # flex has no backward pass on a CPU
            logits, loss = model(idx, idx, documents=DOCUMENTS)
        assert logits.shape == (2, 12, 48) and torch.isfinite(logits).all(), chosen
        if trains:
            loss.backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), chosen


def overfits(chosen):
    """Whether AdamW brings the loss of one batch from ln 64 = 4.16 below 1 within 200 steps."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**TINY, **chosen))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    idx = torch.randint(0, 64, (2, 17))
    for step in range(200):
        for group in optimizer.param_groups:  # post-norm wants a warm-up
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10)
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        if loss.item() < 1.0:
            return True
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return False


# What a model needs to memorise a batch: order in time, and a rate that fits its width.
LEARNABLE = dict(sliding_window=(None, 5), dropout=(0.0, 0.1), bias=(False, True), weight_tying=(False, True),
                 embedding_norm=(False, True), x0_mix=(False, True), value_embeddings=(0, 1),
                 zero_init_residual=(False, True), logit_softcap=(None, 30.0), attn_softcap=(None, 30.0))
LEARNING = {**{axis: architectures.SPACE[axis] for axis in AXES}, **LEARNABLE,
            "attention_backend": ("sdpa", "manual"), "rope_scaling": ("none",)}


def learnable(at_least=1):
    """Combinations that should memorise. DyT has no statistics to bring a small embedding up to scale: it is given a
    larger one, as its authors do, and not asked to hold a post-norm stream together."""
    chosen = architectures.covering(LEARNING, at_least=at_least, mup_base_width=32)[0]
    return [c | ({"embedding_scale": "sqrt"} if c["normalization"] == "dyt" else {}) for c in chosen
            if (c["normalization"], c["norm_position"]) != ("dyt", "post")]


@pytest.mark.parametrize("chosen", learnable()[:24], ids=architectures.name)
def test_overfits_one_batch(chosen):
    assert overfits(chosen)


@pytest.mark.long
@pytest.mark.parametrize("part", range(16))
def test_every_combination_overfits_one_batch(part):
    for chosen in learnable(at_least=400)[part::16]:
        assert overfits(chosen), chosen


def test_released_gpt2_has_its_parameter_count():
    with torch.device("meta"):
        model = build_model(get_preset("gpt2_openai", n_layer=12, n_head=12, n_embd=768, block_size=1024,
                                       vocab_size=50257))
    assert model.parameter_counts()["total"] == 124_439_808
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_numel(name):
    with torch.device("meta"):
        model = build_model(get_preset(name))
    counts = model.parameter_counts()
    assert counts["total"] == counts["trainable"] == sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if "embedding" in n)
    assert counts["non_embedding"] == counts["total"] - embeddings


@pytest.mark.parametrize("name", PRESETS)
def test_initialisation_is_gpt2s_and_reaches_every_residual_projection(name):
    model = build_model(get_preset(name, n_layer=3, n_head=4, n_embd=256, vocab_size=512, block_size=256))
    residual = {f"{m}.weight" for m, module in model.named_modules() if isinstance(module, ResidualProjection)}
    assert {n for n, _ in model.named_parameters() if "down_proj.weight" in n or "o_proj.weight" in n} == residual
    assert len(residual) == 6
    centred = model.config.normalization == "rmsnorm_gemma"  # 1 + weight
    for n, p in model.named_parameters():
        if p.dim() >= 2:
            zero = n in residual and model.config.zero_init_residual
            expected = 0.0 if zero else 0.02 / 6**0.5 if n in residual else 0.02
            assert abs(p.std().item() - expected) <= 0.03 * expected, n  # tens of thousands of draws
            assert abs(p.mean().item()) <= 0.03 * expected * 5
        elif "norm" in n:
            assert (p == (0.0 if n.endswith("bias") or centred else 1.0)).all(), n


def test_shared_parameters_start_equal_across_architectures():
    gpt2, llama = (build_model(get_preset(n, **TINY, d_ff=64), seed=7) for n in ("gpt2", "llama"))
    a, b = dict(gpt2.named_parameters()), dict(llama.named_parameters())
    shared = [n for n in a.keys() & b.keys() if a[n].shape == b[n].shape]
    assert len(shared) >= 2 * 8
    assert all(torch.equal(a[n], b[n]) for n in shared)
    other = dict(build_model(get_preset("gpt2", **TINY, d_ff=64), seed=8).named_parameters())
    assert not torch.equal(a["token_embedding.weight"], other["token_embedding.weight"])


# Another value for every key, and configurations to try it on.
DIFFERENT = dict(
    n_layer=3, n_head=8, n_kv_head=1, n_embd=64, head_dim=12, block_size=24, vocab_size=128, norm_eps=0.5, d_ff=16,
    ffn_multiple_of=24, rope_theta=50.0, rope_theta_local=30.0, rope_fraction=0.25, rope_scaling="linear",
    rope_scaling_factor=3.0, rope_original_context=10_000, bias=True, qkv_bias=True, weight_tying=False, dropout=0.5,
    init="normal", init_std=0.3, zero_init_residual=True, mup_base_width=8, normalization="layernorm",
    norm_position="reordered", parallel_block="one_norm", activation="relu", ffn_type="reglu", position_encoding="none",
    attention_backend="manual", qk_norm="head", attn_gate="headwise", attn_scale=0.5, attn_softcap=0.1,
    logit_softcap=0.1, sliding_window=2, window_pattern="LS", causal=False, mask_documents=True, embedding_scale=2.0,
    embedding_norm=True, residual_scale=0.5, x0_mix=True, value_embeddings=1)
BASES = {
    "gpt2": {}, "llama": {}, "neox": dict(rope_fraction=0.5), "olmo2": dict(norm_position="pre"),
    "custom": dict(normalization="dyt"),
    "gemma3": dict(sliding_window=4, window_pattern="SL", qk_norm="none", rope_scaling="yarn"),
    "qwen3": dict(rope_scaling="llama3", init="mup", sliding_window=3, qk_norm="none", d_ff=40),
}


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(ModelConfig) if f.name != "arch_preset"])
@pytest.mark.parametrize("base", BASES)
def test_every_key_changes_the_model_or_is_reported_as_having_no_effect(base, key):
    idx = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))

    def facts(config):
        model = build_model(config)
        torch.manual_seed(0)
        logits = model(idx, documents=DOCUMENTS)[0]
        return ([(n, tuple(p.shape), p.sum().item()) for n, p in model.named_parameters()],
                [type(m) for m in model.modules()], logits.tolist(), model.lr_multipliers())

    before = {**TINY, "n_head": 4, "init_std": 0.2, **BASES[base]}
    now = get_preset(base, **before).resolve()
    after = {**before, key: DIFFERENT[key]}
    if getattr(now, key) == DIFFERENT[key]:
        after[key] = not DIFFERENT[key] if isinstance(DIFFERENT[key], bool) else "rmsnorm"
    if key == "activation":  # a gated FFN takes but its own
        after[key] = {"geglu": "gelu", "swiglu": "silu"}.get(now.ffn_type, "relu")
    config = get_preset(base, **after)
    same = facts(get_preset(base, **before)) == facts(config)
    if key == "block_size" and config.position_encoding != "learned_absolute":
        return  # the length of the data's windows, not a part of the model
    if key == "activation" and after[key] == "silu":
        assert same  # the configurator refuses it as a flag
    else:
        assert same == (key in config.unused_keys())


@pytest.mark.parametrize("mask_documents", [False, True])
def test_torch_is_asked_for_the_kernel_of_a_training_step(mask_documents, monkeypatch):
    """The same products but for the number of sequences: what is masked, and that gradients are wanted."""
    model = build_model(get_preset("llama", **TINY, n_kv_head=1, sliding_window=4, window_pattern="SL", dropout=0.1,
                                   attention_backend="sdpa", mask_documents=mask_documents))
    asked, done = [], []

    def noted(calls, function):
        def call(q, k, v, attn_mask, **keywords):
            calls.append(([t.requires_grad for t in (q, k, v)], q.dtype, [t.shape[1:] for t in (q, k, v)],
                          None if attn_mask is None else (attn_mask.dtype, attn_mask.shape[1:]), keywords))
            return function(q, k, v, attn_mask=attn_mask, **keywords)
        return call

    monkeypatch.setattr(torch, "_fused_sdp_choice", noted(asked, torch._fused_sdp_choice))
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted(done, F.scaled_dot_product_attention))
    assert set(model.attention_kernels(torch.float32)) == {"4", "full"}
    idx = torch.zeros(2, TINY["block_size"], dtype=torch.long)
    model(idx, idx, documents=torch.zeros_like(idx))
    assert asked == done


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_generation_with_cache_is_generation_without(name, kv_heads):
    torch.manual_seed(0)
    model = build_model(get_preset(name, **TINY, n_kv_head=kv_heads, init_std=0.3)).double()
    prompt = torch.randint(0, 64, (2, 5))
    with_cache = model.generate(prompt, 30, temperature=0, use_cache=True)  # past block_size too
    assert torch.equal(with_cache, model.generate(prompt, 30, temperature=0, use_cache=False))
    assert torch.equal(with_cache[:, :5], prompt) and with_cache.shape == (2, 35)
    longer = torch.randint(0, 64, (1, 40))
    assert model.generate(longer, 3).shape == (1, 43)


def test_generation_is_repeatable_stops_and_bars_padding():
    model = build_model(get_preset("llama", **TINY))
    prompt = torch.zeros(1, 1, dtype=torch.long)
    a, b = (model.generate(prompt, 20, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert model.generate(prompt, 200, vocab_size=5, generator=torch.Generator().manual_seed(0)).max() < 5
    stopped = model.generate(prompt, 500, vocab_size=4, stop=3, generator=torch.Generator().manual_seed(0))
    assert stopped[0, -1] == 3 and (stopped[0, :-1] != 3).all() and stopped.shape[1] < 501


def test_sampling_cuts_the_tail_as_asked():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature=1.0, top_k=None, top_p=None):
        return set(sample_token(logits.clone(), temperature, top_k, top_p, None, generator).flatten().tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_k=99) == {0, 1, 2, 3}
    assert drawn(top_p=0.5) == {0}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(top_p=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=0) == {0}


def test_weights_of_another_architecture_are_refused_whole():
    model = build_model(get_preset("gpt2", **TINY))
    before = {n: p.clone() for n, p in model.named_parameters()}
    for other in (get_preset("llama", **TINY), get_preset("gpt2", **{**TINY, "vocab_size": 128})):
        with pytest.raises(UserError, match="somewhere"):
            load_weights(model, dict(build_model(other).named_parameters()), "somewhere")
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_new_norm_is_one_class_and_one_line(tmp_path, data_dir):
    """The worked example of docs/ARCHITECTURE.md, done to a copy of the project: nothing else has to be touched."""
    root = Path(__file__).resolve().parents[2]
    for source in root.glob("*.py"):
        shutil.copy(source, tmp_path)
    shutil.copytree(root / "blockgpt", tmp_path / "blockgpt")
    example = (root / "docs/ARCHITECTURE.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(example.splitlines()) < 20
    cls, line = example.split("# model_config.py, NORMALIZATION\n")
    with open(tmp_path / "model_components.py", "a") as f:
        f.write("\n\n" + cls)
    table = (tmp_path / "model_config.py").read_text()
    (tmp_path / "model_config.py").write_text(table.replace("NORMALIZATION = {\n", "NORMALIZATION = {\n" + line, 1))
    code = """
from configurator import help_text, load_config
from model_builder import build_model
from blockgpt.accounting.flops import flops_per_token
config = load_config(["--normalization=scalenorm", "--n_layer=1"]).model
model = build_model(config)
assert "scalenorm" in help_text() and "-Scale-" in model.built().arch_name()
assert model.parameter_counts()["total"] == sum(p.numel() for p in model.parameters())
assert flops_per_token(model, 8)["train"] > 0
assert config.unused_keys().get("norm_eps") is None
import torch
from blockgpt.accounting.memory import MemoryAccount
saved = MemoryAccount(build_model, config, torch.float32, gpu=False).saved_in("final_norm")
assert saved.per_sequence > 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "train.py", "--normalization=scalenorm", "--n_embd=32", "--n_layer=1",
                           "--block_size=32", "--max_iters=30", "--eval_tokens=512", "--dataset=text", "--device=cpu",
                           "--mfu_peak=1", f"--data_dir={data_dir}", "--run_name=new"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "runs/new/run.json").read_text())
    assert run["arch_name"] == "1L-4H-32D-AbsPos-Scale-GELU-PreNorm"
    assert run["results"]["val_loss"] < 5.7  # from ln 320 = 5.77
