"""model_flops: every printed FLOP against torch's own counter, every peak against its name."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_builder import build_model
from model_config import PRESETS, get_preset
from model_flops import flops_per_token, forward_flops, look_up_peak, peak_flops


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("overrides", [
    dict(n_layer=3, n_head=4, n_embd=64, vocab_size=96, block_size=32),
    dict(n_layer=1, n_head=6, n_kv_head=2, n_embd=48, head_dim=16, d_ff=100, vocab_size=50, block_size=7, bias=True),
])
@pytest.mark.parametrize("backend", ["sdpa", "manual"])
def test_flops_are_those_that_torch_counts(name, overrides, backend):
    model = build_model(get_preset(name, **overrides, attention_backend=backend))
    B, T = 2, overrides["block_size"]
    idx = torch.randint(0, overrides["vocab_size"], (B, T))
    # The counter does not know the CPU's fused attention; the plain one is made of products that it sees.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(idx, idx)[1]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    account = flops_per_token(model, T)
    assert sum(account["forward"].values()) * B * T == forward.get_total_flops()
    assert account["train"] * B * T == forward.get_total_flops() + backward.get_total_flops()


def test_full_size_presets_on_meta_are_counted_the_same():
    for name in PRESETS:
        with torch.device("meta"):
            model = build_model(get_preset(name, attention_backend="manual", block_size=128))
            idx = torch.empty(1, 128, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                model(idx)
        assert sum(forward_flops(model, 128).values()) * 128 == counter.get_total_flops()


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
