"""Activation checkpointing: the same loss and gradients to the last bit, for the computation that it says."""

import contextlib
import shutil

import architectures
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blockgpt.training.recompute import CHECKPOINTING_MODES, PRODUCTS, drops_out, recompute
from model_builder import build_model
from model_config import PRESETS, ModelConfig, get_preset

SIZE = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=48, block_size=12)
DTYPES = (torch.float32, torch.bfloat16)
aten = torch.ops.aten


def step(model, dtype=torch.float32):
    """[loss, every gradient] of two micro-batches, with the same tokens and the same dropout each time."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    model.zero_grad()
    for _ in range(2):
        idx = torch.randint(0, model.config.vocab_size, (3, model.config.block_size), generator=generator)
        with torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext():
            loss = model(idx, idx.flip(0), documents=idx.flip(1) // 20)[1]
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check(config, dtype):
    model = build_model(config)
    plain = step(model, dtype)
    for kind in CHECKPOINTING_MODES:
        assert equal(step(recompute(model, kind), dtype), plain), kind


# ---- the same numbers


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradients_are_equal_to_the_last_bit(name, dtype, dropout):
    check(get_preset(name, **SIZE, dropout=dropout), dtype)


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 8))])
def test_loss_and_gradients_are_equal_for_all_pairs_of_options(part):
    space = {**architectures.SPACE, "attention_backend": ("sdpa", "manual")}  # flex has no backward pass on a CPU
    for i, chosen in enumerate(architectures.covering(space, at_least=200)[0][part::8]):
        check(ModelConfig(**architectures.TINY | chosen), DTYPES[i % 2])


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=[
    pytest.mark.long, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")])])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by block"])
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_it_can_be_compiled(kind, whole, backend):
    torch.compiler.reset()
    model = build_model(get_preset("llama", **SIZE))
    plain = step(model)
    recompute(model, kind)
    for part in [model] if whole else model.blocks:
        part.compile(backend=backend)
    torch.testing.assert_close(step(model), plain, rtol=1e-4, atol=1e-6)  # a compiler adds up in an order of its own


# ---- what it costs


def flops(model):
    """(FLOPs of a step, of a forward pass of the model, of its head), of matrix products and attention kernels."""
    idx = torch.zeros(2, model.config.block_size, dtype=torch.long)
    counts = []
    for backward in (True, False):
        with FlopCounterMode(display=False) as counter:
            loss = model(idx, idx)[1]
            if backward:
                loss.backward()
        counts.append(counter)
    return [c.get_total_flops() for c in counts] + [sum(counts[1].flop_counts["GPT.lm_head"].values())]


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_full_costs_a_forward_pass_of_the_blocks_and_selective_no_product(name, backend):
    model = build_model(get_preset(name, **SIZE, attention_backend=backend))
    plain, forward, head = flops(model)
    assert plain == 3 * forward or backend == "sdpa"  # the counter does not know every kernel of a CPU
    assert flops(recompute(model, "selective"))[0] == plain
    # torch ends the second run where nothing more is wanted of it, which may be before the FFN's last product
    last = sum(2 * 2 * SIZE["block_size"] * block.ffn.down_proj.weight.numel() for block in model.blocks)
    more = flops(recompute(model, "full"))[0] - plain
    assert forward - head - last <= more <= forward - head


def test_attention_that_drops_out_is_run_again():
    query = object()
    for op, args in ((aten._scaled_dot_product_flash_attention.default, (query, query, query)),
                     (aten._scaled_dot_product_efficient_attention.default, (query, query, query, None, True)),
                     (aten._scaled_dot_product_cudnn_attention.default, (query, query, query, None, True))):
        assert op in PRODUCTS
        assert drops_out(op, (*args, 0.1), {}) and drops_out(op, args, {"dropout_p": 0.1})
        assert not drops_out(op, args, {}) and not drops_out(op, (*args, 0.0), {})
    assert not drops_out(aten.mm.default, (query, query), {})


# ---- what it leaves alone


@pytest.mark.parametrize("kind", CHECKPOINTING_MODES)
def test_the_model_is_what_it_was(kind):
    model = build_model(get_preset("llama", **SIZE, sliding_window=4))
    idx = torch.arange(8)[None]
    before = (model.infer_config(), [n for n, _ in model.named_modules()], list(model.state_dict()),
              model.generate(idx, 9, temperature=0).tolist(), model.eval()(idx)[0].tolist())
    assert recompute(model, kind) is model
    after = (model.infer_config(), [n for n, _ in model.named_modules()], list(model.state_dict()),
             model.generate(idx, 9, temperature=0).tolist(), model.eval()(idx)[0].tolist())
    assert after == before


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_without_gradients_nothing_is_checkpointed(kind, monkeypatch):
    monkeypatch.setattr("blockgpt.training.recompute.checkpoint", None)  # would fail if it were called
    model = recompute(build_model(get_preset("gpt2", **SIZE)), kind)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TypeError):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_none_takes_away_what_was_there():
    model = build_model(get_preset("gpt2", **SIZE))
    for kind in ("full", "selective", "none"):
        recompute(model, kind)
    assert not any("forward" in vars(block) for block in model.blocks)
