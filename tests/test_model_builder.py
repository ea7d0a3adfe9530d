"""model_builder: every combination builds and learns, from weights that depend on (seed, name) alone."""

import dataclasses
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from errors import UserError
from model_builder import build_model, load_weights, sample_token
from model_components import ResidualProjection
from model_config import AXES, PRESETS, ModelConfig, get_preset

TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)


def combinations():
    """All axes × bias × weight_tying × dropout; an FFN that brings its activation takes no other."""
    flags = {"bias": (False, True), "weight_tying": (False, True), "dropout": (0.0, 0.1)}
    axes = {**{name: list(table) for name, table in AXES.items()}, **flags}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        if AXES["ffn_type"][chosen["ffn_type"]].implies:
            if chosen["activation"] != next(iter(AXES["activation"])):
                continue
            chosen["activation"] = None
        yield chosen


ALL = list(combinations())


@pytest.mark.parametrize("position", AXES["position_encoding"])
@pytest.mark.parametrize("norm", AXES["normalization"])
def test_all_combinations_build_and_run_forward_and_backward(norm, position):
    idx = torch.randint(0, 64, (2, 16))
    mine = [c for c in ALL if (c["normalization"], c["position_encoding"]) == (norm, position)]
    assert len(mine) == len(ALL) // (len(AXES["normalization"]) * len(AXES["position_encoding"]))
    for chosen in mine:
        model = build_model(ModelConfig(**TINY | {"n_layer": 1}, **chosen))
        logits, loss = model(idx, idx)
        loss.backward()
        assert logits.shape == (2, 16, 64)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), chosen
        assert model.built() == model.config, chosen


def overfits(chosen):
    """Loss of one memorised batch after 60 steps of AdamW."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**TINY, **chosen))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    idx = torch.randint(0, 64, (2, 17))
    for step in range(60):
        for group in optimizer.param_groups:  # post-norm wants a warm-up
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10)
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def covering():
    """A sample of the combinations in which every pair of options stands together somewhere."""
    chosen, covered = [], set()
    for c in random.Random(0).sample(ALL, len(ALL)):
        pairs = set(itertools.combinations(c.items(), 2))
        if not pairs <= covered:
            chosen.append(c)
            covered |= pairs
    return chosen


@pytest.mark.parametrize("chosen", covering(), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_overfits_one_batch(chosen):
    assert overfits(chosen) < 1.0  # from ln 64 = 4.16


@pytest.mark.long
@pytest.mark.parametrize("part", range(16))
def test_every_combination_overfits_one_batch(part):
    for chosen in ALL[part::16]:
        assert overfits(chosen) < 1.0, chosen


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
    for n, p in model.named_parameters():
        if p.dim() >= 2:
            expected = 0.02 / 6**0.5 if n in residual else 0.02
            assert abs(p.std().item() / expected - 1) < 0.03, n  # tens of thousands of draws
            assert abs(p.mean().item()) < 0.03 * expected * 5
        else:
            assert (p == (0.0 if n.endswith("bias") else 1.0)).all(), n


def test_shared_parameters_start_equal_across_architectures():
    gpt2, llama = (build_model(get_preset(n, **TINY, d_ff=64), seed=7) for n in ("gpt2", "llama"))
    a, b = dict(gpt2.named_parameters()), dict(llama.named_parameters())
    shared = [n for n in a.keys() & b.keys() if a[n].shape == b[n].shape]
    assert len(shared) >= 2 * 8
    assert all(torch.equal(a[n], b[n]) for n in shared)
    other = dict(build_model(get_preset("gpt2", **TINY, d_ff=64), seed=8).named_parameters())
    assert not torch.equal(a["token_embedding.weight"], other["token_embedding.weight"])


DIFFERENT = {"n_layer": 3, "n_head": 4, "n_kv_head": 1, "n_embd": 64, "head_dim": 8, "block_size": 8, "vocab_size": 128,
             "norm_eps": 0.5, "d_ff": 16, "rope_theta": 50.0, "bias": True, "weight_tying": False, "dropout": 0.5,
             "init_std": 0.1, "normalization": "layernorm", "norm_position": "post", "activation": "relu",
             "ffn_type": "swiglu", "position_encoding": "none", "attention_backend": "manual"}


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(ModelConfig) if f.name != "arch_preset"])
def test_every_key_changes_the_model(key):
    base = dict(TINY, position_encoding="rope", n_layer=2)
    idx = torch.randint(0, 64, (2, 8))

    def facts(**overrides):
        model = build_model(ModelConfig(**{**base, **overrides}))
        torch.manual_seed(0)
        return ([(n, tuple(p.shape)) for n, p in model.named_parameters()], [type(m) for m in model.modules()],
                model(idx)[0].sum().item())

    if key == "block_size":  # only a table of positions is as long as the context
        base["position_encoding"] = "learned_absolute"
    assert facts() != facts(**{key: DIFFERENT[key]})


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


def test_a_new_norm_is_one_class_and_one_line(tmp_path):
    """The worked example of docs/ARCHITECTURE.md, done to a copy of the project."""
    root = Path(__file__).resolve().parent.parent
    for source in root.glob("*.py"):
        shutil.copy(source, tmp_path)
    example = (root / "docs/ARCHITECTURE.md").read_text().split("```python\n")[1].split("```")[0]
    cls, line = example.split("# model_config.py, NORMALIZATION\n")
    with open(tmp_path / "model_components.py", "a") as f:
        f.write("\n\n" + cls)
    table = (tmp_path / "model_config.py").read_text()
    (tmp_path / "model_config.py").write_text(table.replace("NORMALIZATION = {\n", "NORMALIZATION = {\n" + line, 1))
    code = """
from configurator import help_text, load_config
from model_builder import build_model
from model_flops import flops_per_token
config = load_config(["--normalization=scalenorm", "--n_layer=1"]).model
model = build_model(config)
assert "scalenorm" in help_text() and "-Scale-" in model.built().arch_name()
assert model.parameter_counts()["total"] == sum(p.numel() for p in model.parameters())
assert flops_per_token(model, 8)["train"] > 0
import torch
idx = torch.zeros(1, 8, dtype=torch.long)
model(idx, idx)[1].backward()
assert model.final_norm.weight.grad is not None
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
