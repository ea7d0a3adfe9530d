"""What a model costs and what a device can do: FLOPs per token, peaks, model FLOPs utilisation (MFU).

FLOPs are those of the matrix products, a multiply-add counting as two, summed from the components' own
`flops(seq_len)`, which say what is computed. Training costs three forwards: one, and two products in the backward
for each. What of the attention scores is to be credited is a convention: PaLM's (Chowdhery 2022, appendix B)
counts every key in a layer's span (the sequence, or its sliding window) though half is masked; the causal one counts
those that are not. A backend that computes what it then masks earns nothing by it. Documents kept apart count as if
they were one. MFU is by the PaLM convention.
"""

import re
import time
from collections import Counter

import torch

# Dense peaks in TFLOP/s by whole words of torch.cuda.get_device_name(); 2:4 sparsity doubles them. The first match
# counts, so a longer name stands before the shorter one that it contains. From the vendors' data sheets.
GPU_PEAKS = (
    ("GB300", dict(bfloat16=2500, float16=2500, tf32=1250)),
    ("GB200", dict(bfloat16=2500, float16=2500, tf32=1250)),
    ("B300", dict(bfloat16=2250, float16=2250, tf32=1125)),
    ("B200", dict(bfloat16=2250, float16=2250, tf32=1125)),
    ("H200 NVL", dict(bfloat16=836, float16=836)),
    ("H200", dict(bfloat16=989.4, float16=989.4, tf32=494.7)),
    ("H20", dict(bfloat16=148, float16=148, tf32=74)),
    ("H100 PCIe", dict(bfloat16=756, float16=756, tf32=378)),
    ("H100 NVL", dict(bfloat16=835, float16=835)),
    ("H100 80GB HBM3", dict(bfloat16=989.4, float16=989.4, tf32=494.7)),
    ("A100", dict(bfloat16=312, float16=312, tf32=156)),
    ("V100-PCIE", dict(float16=112)),
    ("V100-SXM2", dict(float16=125)),
    ("T4", dict(float16=65)),
    ("A10G", dict(bfloat16=70, float16=70, tf32=35)),
    ("A10", dict(bfloat16=125, float16=125)),
    ("RTX A6000", dict(bfloat16=154.8, float16=154.8, tf32=77)),
    ("RTX 3090", dict(bfloat16=71, float16=71, tf32=35.6)),
    ("RTX 4090", dict(bfloat16=165.2, float16=165.2, tf32=82.6)),
    ("RTX 5090", dict(bfloat16=209.5, float16=209.5, tf32=105)),
    ("L40S", dict(bfloat16=362, float16=362, tf32=183)),
    ("L4", dict(bfloat16=121, float16=121, tf32=60)),
    ("MI300X", dict(bfloat16=1307.4, float16=1307.4, tf32=654)),
)
OTHER_CHIPS = re.compile(r"\b(Ti|SUPER|D|Laptop|Max-Q|MIG)\b")  # after a name above, another chip or a slice of one
NO_SPARSITY = ("V100", "T4")


def forward_flops(model, seq_len):
    """{account: forward FLOPs per token} of a `GPT` at sequences of seq_len tokens, as its parts compute them."""
    accounts = Counter()
    for module in model.modules():
        if hasattr(module, "flops"):
            accounts.update(module.flops(seq_len))
    return dict(accounts)


def flops_per_token(model, seq_len):
    """The whole account, as `run.json` keeps it: forward by part, as computed, and training by both conventions."""
    forward = forward_flops(model, seq_len)
    rest = sum(forward.values()) - forward["attention scores"]

    def train(convention):
        attention = (block.attn for block in model.blocks)
        return 3 * (rest + sum(a.score_flops(a.needed_keys(seq_len, convention)) for a in attention))

    return {"forward": forward, "train": train("PaLM"), "train_causal": train("causal"), "convention": "PaLM"}


def look_up_peak(name, kind, sparse=False):
    """(peak in FLOP/s or None, one line of why) for a device name and bfloat16 | float16 | tf32 | float32."""
    for part, peaks in GPU_PEAKS:
        if re.search(rf"\b{part}\b", name) and not OTHER_CHIPS.search(name):
            if kind not in peaks or (sparse and part.startswith(NO_SPARSITY)):
                return None, f"no {'sparse ' * sparse}{kind} peak is known for {name} (set one with --mfu_peak=TFLOPS)"
            return peaks[kind] * 1e12 * (2 if sparse else 1), f"{part}, {kind} {'2:4 sparse' if sparse else 'dense'}"
    return None, f"no peak is known for {name!r} (set one with --mfu_peak=TFLOPS)"


def peak_flops(device, dtype, tf32, mfu_peak):
    """(peak in FLOP/s of one device or None, why): what MFU divides by.

    device: torch.device; dtype: of the matrix products; tf32: whether float32 products use it;
    mfu_peak: 'dense', 'sparse' or TFLOP/s. A CPU's is measured here; an unknown device has none, never a guess.
    """
    if not isinstance(mfu_peak, str):
        return mfu_peak * 1e12, "as --mfu_peak says"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return measure_matmul(dtype), f"measured: a {str(dtype)[6:]} matrix product on {threads} CPU threads"
    if device.type != "cuda":
        return None, f"no peak is known for {device.type} devices (set one with --mfu_peak=TFLOPS)"
    kind = "tf32" if dtype == torch.float32 and tf32 else str(dtype)[6:]
    return look_up_peak(torch.cuda.get_device_name(device), kind, sparse=mfu_peak == "sparse")


def measure_matmul(dtype, n=1024, seconds=0.25):
    """FLOP/s of the best of several n x n matrix products on the CPU."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
