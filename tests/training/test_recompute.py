"""Activation checkpointing: bitwise the same loss and gradients, at the stated cost."""

import contextlib
import shutil

import architectures
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blockgpt.training.recompute import CHECKPOINTING_MODES, MATMUL_OPS, recompute, uses_dropout
from model_builder import build_model
from model_config import PRESETS, ModelConfig, get_preset

SIZE = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=48, block_size=12)
DTYPES = (torch.float32, torch.bfloat16)
aten = torch.ops.aten


def loss_and_gradients(model, dtype=torch.float32):
    """[loss, every gradient] of two micro-batches, with the same tokens and the same dropout each time."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    model.zero_grad()
    for _ in range(2):
        idx = torch.randint(0, model.config.vocab_size, (3, model.config.block_size), generator=generator)
        with torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext():
            loss = model(idx, idx.flip(0), segment_ids=idx.flip(1) // 20)
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def assert_all_modes_are_equal(config, dtype):
    model = build_model(config)
    plain = loss_and_gradients(model, dtype)
    for mode in CHECKPOINTING_MODES:
        tensors = loss_and_gradients(recompute(model, mode), dtype)
        assert all(torch.equal(a, b) for a, b in zip(tensors, plain, strict=True)), mode


# ---- equality

LONG = pytest.mark.long
SHORT_PRESETS = ("gpt2", "gemma3")
PRESET_CASES = [
    pytest.param(name, dtype, dropout, id=f"{name} {dtype} {dropout}",
                 marks=[] if name in SHORT_PRESETS and (dtype == torch.float32) == (dropout > 0) else LONG)
    for name in PRESETS for dtype in DTYPES for dropout in (0.0, 0.1)]


@pytest.mark.parametrize("name, dtype, dropout", PRESET_CASES)
def test_loss_and_gradients_are_bitwise_equal(name, dtype, dropout):
    assert_all_modes_are_equal(get_preset(name, **SIZE, dropout=dropout), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, *(pytest.param(i, marks=LONG) for i in range(1, 8))])
def test_loss_and_gradients_are_bitwise_equal_for_all_pairs_of_options(offset):
    space = {**architectures.SPACE, "attention_backend": ("sdpa", "manual")}  # flex has no backward pass on a CPU
    for i, options in enumerate(architectures.covering(space, at_least=200)[0][offset::8]):
        assert_all_modes_are_equal(ModelConfig(**architectures.TINY | options), DTYPES[i % 2])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=[
    LONG, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")])])
@pytest.mark.parametrize("mode, by_block", [("full", True), ("selective", False), pytest.param(
    "full", False, marks=LONG), pytest.param("selective", True, marks=LONG)])
def test_it_can_be_compiled(mode, by_block, backend):
    torch.compiler.reset()
    model = build_model(get_preset("llama", **SIZE))
    plain = loss_and_gradients(model)
    recompute(model, mode)
    for module in model.blocks if by_block else [model]:
        module.compile(backend=backend)
    torch.testing.assert_close(loss_and_gradients(model), plain, rtol=1e-4, atol=1e-6)  # a compiler changes the order


# ---- cost


def count_flops(model):
    """(FLOPs of a training step, of a forward pass, of the head): matrix products and attention kernels."""
    idx = torch.zeros(2, model.config.block_size, dtype=torch.long)
    counters = []
    for backward in (True, False):
        with FlopCounterMode(display=False) as counter:
            loss = model(idx, idx)
            if backward:
                loss.backward()
        counters.append(counter)
    return [c.get_total_flops() for c in counters] + [sum(counters[1].flop_counts["GPT.lm_head"].values())]


@pytest.mark.grid(3)
@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_full_costs_a_forward_pass_of_the_blocks_and_selective_no_matrix_product(name, backend):
    model = build_model(get_preset(name, **SIZE, attention_backend=backend))
    plain, forward, head = count_flops(model)
    assert plain == 3 * forward or backend == "sdpa"  # the counter does not know every kernel of a CPU
    assert count_flops(recompute(model, "selective"))[0] == plain
    # torch stops the recomputation at the last saved tensor, which may come before the FFN's last product.
    last_products = sum(2 * 2 * SIZE["block_size"] * block.ffn.down_proj.weight.numel() for block in model.blocks)
    recomputed = count_flops(recompute(model, "full"))[0] - plain
    assert forward - head - last_products <= recomputed <= forward - head


def test_attention_with_dropout_is_recomputed():
    query = object()
    for op, args in ((aten._scaled_dot_product_flash_attention.default, (query, query, query)),
                     (aten._scaled_dot_product_efficient_attention.default, (query, query, query, None, True)),
                     (aten._scaled_dot_product_cudnn_attention.default, (query, query, query, None, True))):
        assert op in MATMUL_OPS
        assert uses_dropout(op, (*args, 0.1), {}) and uses_dropout(op, args, {"dropout_p": 0.1})
        assert not uses_dropout(op, args, {}) and not uses_dropout(op, (*args, 0.0), {})
    assert not uses_dropout(aten.mm.default, (query, query), {})


# ---- what does not change


@pytest.mark.parametrize("mode", CHECKPOINTING_MODES)
def test_names_and_evaluation_do_not_change(mode):
    model = build_model(get_preset("llama", **SIZE, sliding_window=4))
    idx = torch.arange(8)[None]

    def description():
        return (model.infer_config(), [n for n, _ in model.named_modules()], list(model.state_dict()),
                model.generate(idx, 9, temperature=0).tolist(), model.eval()(idx).tolist())

    before = description()
    assert recompute(model, mode) is model
    assert description() == before


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_without_gradients_nothing_is_checkpointed(mode, monkeypatch):
    monkeypatch.setattr("blockgpt.training.recompute.checkpoint", None)  # fails if it is called
    model = recompute(build_model(get_preset("gpt2", **SIZE)), mode)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TypeError):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_none_removes_the_checkpointing_of_an_earlier_call():
    model = build_model(get_preset("gpt2", **SIZE))
    for mode in ("full", "selective", "none"):
        recompute(model, mode)
    assert not any("forward" in vars(block) for block in model.blocks)
