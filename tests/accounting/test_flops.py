"""FLOPs: every reported number against torch's own counter, for all backends.

torch's counter does not see inside flex_attention, so there it counts torch's eager reference of that operator, which
computes every product. The blocks that the kernel skips are compared with torch's `BlockMask`.
"""

import architectures
import pytest
import torch
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

import model_attention
from blockgpt.accounting.flops import flops_per_token, forward_flops
from model_builder import GPT, build_model
from model_config import PRESETS, ModelConfig, get_preset


@pytest.fixture
def eager_flex(monkeypatch):
    """flex_attention replaced by its eager reference, whose matrix products the counter sees."""
    def attend(q, k, v, score_mod=None, block_mask=None, scale=None, enable_gqa=False):
        block_mask = block_mask or flex_attention._create_empty_block_mask(q, k)
        return math_attention(q, k, v, score_mod or flex_attention._identity, block_mask.as_tuple(), scale, {})[0]

    monkeypatch.setattr(model_attention, "flex_attention", attend)


# The counter does not know the product that adds in place, as the chunked loss does in its forward pass.
IN_PLACE = {torch.ops.aten.addmm_: lambda *shapes, out_shape: addmm_flop(*shapes)}


def count(model: GPT, T: int, B: int = 2) -> tuple[int, int]:
    """(forward, backward) FLOPs of a batch, by torch's own counter."""
    idx = torch.randint(0, model.config.vocab_size, (B, T))
    documents = (idx == 0).cumsum(dim=1)
    # The counter does not know the CPU's fused attention. The MATH backend consists of products that it sees.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as forward:
            loss = model(idx, idx, segment_ids=documents)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("residue", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 8))])
def test_flops_equal_torchs_count_for_all_pairs_of_options(eager_flex, residue):
    combinations = architectures.covering(at_least=200)[0]
    assert len(combinations) >= 200 and {"sdpa", "manual", "flex"} <= {c["attention_backend"] for c in combinations}
    for options in combinations[residue::8]:
        model = build_model(ModelConfig(**architectures.TINY | options))
        flops = forward_flops(model, 12)
        computed, (forward, backward) = sum(flops.values()) * 2 * 12, count(model, 12)
        if 0 < model.config.loss_chunk < 2 * 12:  # it has the gradients of the head in the forward pass
            again = flops["output head"] * 2 * 12 if model.config.head_bias else 0  # with a bias: logits twice
            assert forward + backward == 3 * computed + again, options
        else:
            assert (forward, backward) == (computed, 2 * computed), options


@pytest.mark.grid(6)
@pytest.mark.parametrize("backend", ["auto", "flex"])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("overrides", [
    dict(n_layer=3, n_head=4, n_embd=64, vocab_size=96, block_size=32),
    dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=48, head_dim=16, d_ff=100, vocab_size=50, block_size=7, bias=True),
], ids=["usual", "odd"])
def test_flops_of_presets_equal_torchs_count(eager_flex, name, overrides, backend):
    model = build_model(get_preset(name, **overrides, attention_backend=backend))
    T = overrides["block_size"]
    flops, (forward, backward) = flops_per_token(model, T), count(model, T)
    assert sum(flops["forward"].values()) * 2 * T == forward
    assert flops["train"] * 2 * T == forward + backward  # no window is shorter than T


@pytest.mark.slow
def test_flops_of_full_size_presets_equal_torchs_count():
    for name in PRESETS:
        with torch.device("meta"):
            model = build_model(get_preset(name, attention_backend="manual", block_size=128))
            idx = torch.empty(1, 128, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                model(idx)
        assert sum(forward_flops(model, 128).values()) * 128 == counter.get_total_flops()


@pytest.mark.parametrize("T, window, causal", [(64, 10, True), (64, 64, True), (64, 100, True), (64, 1, True),
                                               (64, 10, False), (5, 3, False)])
def test_windows_are_credited_by_convention(T, window, causal):
    shape = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=8, block_size=T, causal=causal)
    windowed, full = (build_model(ModelConfig(**shape, sliding_window=w)) for w in (window, None))
    keys = {c: model_attention.credited_keys(T, window, causal, c) for c in ("PaLM", "causal")}
    positions = torch.arange(T)
    mask_spec = model_attention.AttentionMaskSpec(positions, positions, window, causal, None, None)
    visible = mask_spec.is_visible(positions[:, None] - positions).sum().item() / T
    if causal:  # the convention leaves out half a key on the diagonal
        assert keys["PaLM"] == min(T, window)
        assert abs(keys["causal"] + 0.5 - visible) <= 0.5
    else:
        assert visible <= keys["causal"] == keys["PaLM"] <= T
    a, b = flops_per_token(windowed, T), flops_per_token(full, T)
    assert a["forward"] == b["forward"]  # the backend computes what it masks
    assert b["train"] - a["train"] == 3 * 4 * 16 * (T - keys["PaLM"])


@pytest.mark.parametrize("T, window, causal", [(1000, None, True), (1000, 1, True), (1000, 129, True),
                                               (1000, 130, True), (300, 40, False), (50, 7, True)])
def test_flex_computes_the_blocks_of_torchs_block_mask(T, window, causal):
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=8, block_size=T, sliding_window=window,
                                    attention_backend="flex", causal=causal))
    backend = model.blocks[0].attn.backend
    positions = torch.arange(T)
    block_mask, _ = backend.mask(model_attention.AttentionMaskSpec(positions, positions, window, causal, None, None))
    blocks = block_mask.kv_num_blocks.sum() + (block_mask.full_kv_num_blocks.sum()
                                               if block_mask.full_kv_num_blocks is not None else 0)
    assert backend.computed_keys(T, window, causal) == min(T, blocks.item() * 128 / block_mask.kv_num_blocks.numel())


def test_gpt2_at_124m_costs_what_palms_formula_says():
    with torch.device("meta"):
        model = build_model(get_preset("gpt2_openai"))
    flops = flops_per_token(model, 1024)
    in_products = 124_439_808 - 1024 * 768 - sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert flops["train"] == 6 * in_products + 12 * 12 * 768 * 1024
    assert 850e6 < flops["train"] < 860e6
    assert flops["train"] - flops["train_causal"] == 6 * 12 * 768 * 1024
