"""model_flops: every printed FLOP against torch's own counter, every peak against its name."""

import architectures
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blockgpt.accounting.flops import flops_per_token, forward_flops
from blockgpt.accounting.hardware import look_up_peak, peak_flops
from model_builder import build_model
from model_config import PRESETS, ModelConfig, get_preset


def counted(model, T, B=2):
    """(forward, backward) FLOPs of a batch by torch's own counter."""
    idx = torch.randint(0, model.config.vocab_size, (B, T))
    documents = (idx == 0).cumsum(dim=1)
    # The counter does not know the CPU's fused attention; the plain one is made of products that it sees.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(idx, idx, documents=documents)[1]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("part", range(4))
def test_flops_are_those_that_torch_counts_for_all_pairs_of_options(part):
    space = {**architectures.SPACE, "attention_backend": ("sdpa", "manual")}  # flex has no backward pass on a CPU
    combinations = architectures.covering(space, at_least=200)[0]
    assert len(combinations) >= 200
    for chosen in combinations[part::4]:
        model = build_model(ModelConfig(**architectures.TINY | chosen))
        computed = sum(forward_flops(model, 12).values()) * 2 * 12
        assert counted(model, 12) == (computed, 2 * computed), chosen


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("overrides", [
    dict(n_layer=3, n_head=4, n_embd=64, vocab_size=96, block_size=32),
    dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=48, head_dim=16, d_ff=100, vocab_size=50, block_size=7, bias=True),
])
def test_flops_of_presets_are_those_that_torch_counts(name, overrides):
    model = build_model(get_preset(name, **overrides))
    T = overrides["block_size"]
    account = flops_per_token(model, T)
    assert account["train"] * 2 * T == sum(counted(model, T))  # no window is shorter than T
    assert sum(account["forward"].values()) * 2 * T == counted(model, T)[0]


def test_full_size_presets_on_meta_are_counted_the_same():
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
    attn = windowed.blocks[0].attn
    seen = windowed.sight(window, torch.arange(T)).reach(torch.arange(T)[:, None] - torch.arange(T)).sum().item() / T
    if causal:  # the convention leaves half a key out on the diagonal
        assert attn.needed_keys(T, "PaLM") == min(T, window)
        assert abs(attn.needed_keys(T, "causal") + 0.5 - seen) <= 0.5
    else:
        assert seen <= attn.needed_keys(T, "causal") == attn.needed_keys(T, "PaLM") <= T
    a, b = flops_per_token(windowed, T), flops_per_token(full, T)
    assert a["forward"] == b["forward"]  # masked is computed all the same
    assert b["train"] - a["train"] == 3 * 4 * 16 * (T - attn.needed_keys(T, "PaLM"))


@pytest.mark.parametrize("T, window, causal", [(1000, None, True), (1000, 1, True), (1000, 129, True),
                                               (1000, 130, True), (300, 40, False), (50, 7, True)])
def test_flex_is_accounted_by_the_blocks_that_it_meets(T, window, causal):
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=8, block_size=T, sliding_window=window,
                                    attention_backend="flex", causal=causal))
    attn = model.blocks[0].attn
    block_mask, _ = attn.mask(model.sight(window, torch.arange(T)))
    blocks = block_mask.kv_num_blocks.sum() + (block_mask.full_kv_num_blocks.sum()
                                               if block_mask.full_kv_num_blocks is not None else 0)
    assert attn.computed_keys(T) == min(T, blocks.item() * 128 / block_mask.kv_num_blocks.numel())


def test_gpt2_at_124m_costs_what_palms_formula_says():
    with torch.device("meta"):
        model = build_model(get_preset("gpt2_openai"))
    account = flops_per_token(model, 1024)
    multiplying = 124_439_808 - 1024 * 768 - sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert account["train"] == 6 * multiplying + 12 * 12 * 768 * 1024
    assert 850e6 < account["train"] < 860e6
    assert account["train"] - account["train_causal"] == 6 * 12 * 768 * 1024


@pytest.mark.parametrize("name, kind, tflops", [
    ("NVIDIA B200", "bfloat16", 2250), ("NVIDIA GB200", "bfloat16", 2500), ("NVIDIA B300 SXM6 AC", "bfloat16", 2250),
    ("NVIDIA GB300", "bfloat16", 2500), ("NVIDIA H200", "bfloat16", 989.4), ("NVIDIA H200 NVL", "bfloat16", 836),
    ("NVIDIA H20", "bfloat16", 148), ("NVIDIA H100 80GB HBM3", "float16", 989.4), ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA H100 NVL", "float16", 835), ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
    ("NVIDIA A100-PCIE-40GB", "tf32", 156), ("Tesla V100-SXM2-16GB", "float16", 125),
    ("Tesla V100-PCIE-16GB", "float16", 112), ("Tesla T4", "float16", 65), ("NVIDIA A10G", "bfloat16", 70),
    ("NVIDIA A10", "bfloat16", 125), ("NVIDIA L4", "bfloat16", 121), ("NVIDIA L40S", "bfloat16", 362),
    ("NVIDIA RTX A6000", "bfloat16", 154.8), ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ("AMD Instinct MI300X", "bfloat16", 1307.4), ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
])
def test_peaks_by_device_name(name, kind, tflops):
    peak, why = look_up_peak(name, kind)
    assert peak == tflops * 1e12 and "dense" in why


@pytest.mark.parametrize("name, kind", [
    ("NVIDIA H900", "bfloat16"), ("NVIDIA GH200 480GB", "bfloat16"), ("NVIDIA L40", "bfloat16"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"), ("NVIDIA GeForce RTX 3090 Ti", "bfloat16"),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"), ("NVIDIA RTX A1000", "bfloat16"), ("NVIDIA T400", "float16"),
    ("NVIDIA B200", "float32"), ("Tesla V100-SXM2-16GB", "bfloat16"),
])
def test_unknown_devices_have_no_peak_and_one_line_that_says_so(name, kind):
    peak, why = look_up_peak(name, kind)
    assert peak is None and name in why and "--mfu_peak" in why and "\n" not in why


def test_sparse_and_given_peaks():
    assert look_up_peak("NVIDIA B200", "bfloat16", sparse=True)[0] == 4500e12
    assert look_up_peak("Tesla T4", "float16", sparse=True)[0] is None
    assert peak_flops(torch.device("cpu"), torch.float32, False, 1.5) == (1.5e12, "as --mfu_peak says")
    assert peak_flops(torch.device("mps"), torch.float32, False, "dense")[0] is None
    measured, why = peak_flops(torch.device("cpu"), torch.float32, False, "dense")
    assert measured > 1e8 and "measured" in why
