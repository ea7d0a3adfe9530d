"""What a device can do: the table of GPUs, and the measured peak of a CPU."""

import re
import time
import typing

import torch


class GPU(typing.NamedTuple):
    """One row of the vendors' data sheets.

    name: as whole words of torch.cuda.get_device_name(). memory: in GB as the vendor states it, who means 2^30 bytes.
    watts: of the board at most. peaks: {type: dense TFLOP/s}; 2:4 sparsity doubles them.
    """

    name: str
    memory: int
    watts: int
    peaks: dict
# The first match counts, so a longer name stands before the shorter one that it contains, and the usual one of a family
# before its sisters.
GPUS = (
    GPU("GB300", 279, 1400, dict(bfloat16=2500, float16=2500, tf32=1250)),
    GPU("GB200", 186, 1200, dict(bfloat16=2500, float16=2500, tf32=1250)),
    GPU("B300", 270, 1400, dict(bfloat16=2250, float16=2250, tf32=1125)),
    GPU("B200", 180, 1000, dict(bfloat16=2250, float16=2250, tf32=1125)),
    GPU("H200 NVL", 141, 600, dict(bfloat16=836, float16=836)),
    GPU("H200", 141, 700, dict(bfloat16=989.4, float16=989.4, tf32=494.7)),
    GPU("H20", 96, 400, dict(bfloat16=148, float16=148, tf32=74)),
    GPU("H100 80GB HBM3", 80, 700, dict(bfloat16=989.4, float16=989.4, tf32=494.7)),  # the SXM one
    GPU("H100 PCIe", 80, 350, dict(bfloat16=756, float16=756, tf32=378)),
    GPU("H100 NVL", 94, 400, dict(bfloat16=835, float16=835)),
    GPU("A100-SXM4-40GB", 40, 400, dict(bfloat16=312, float16=312, tf32=156)),
    GPU("A100 80GB PCIe", 80, 300, dict(bfloat16=312, float16=312, tf32=156)),
    GPU("A100-PCIE-40GB", 40, 250, dict(bfloat16=312, float16=312, tf32=156)),
    GPU("A100", 80, 400, dict(bfloat16=312, float16=312, tf32=156)),
    GPU("V100-SXM2-32GB", 32, 300, dict(float16=125)),
    GPU("V100-SXM2", 16, 300, dict(float16=125)),
    GPU("V100-PCIE-32GB", 32, 250, dict(float16=112)),
    GPU("V100-PCIE", 16, 250, dict(float16=112)),
    GPU("T4", 16, 70, dict(float16=65)),
    GPU("A10G", 24, 300, dict(bfloat16=70, float16=70, tf32=35)),
    GPU("A10", 24, 150, dict(bfloat16=125, float16=125)),
    GPU("RTX A6000", 48, 300, dict(bfloat16=154.8, float16=154.8, tf32=77)),
    GPU("RTX 3090", 24, 350, dict(bfloat16=71, float16=71, tf32=35.6)),
    GPU("RTX 4090", 24, 450, dict(bfloat16=165.2, float16=165.2, tf32=82.6)),
    GPU("RTX 5090", 32, 575, dict(bfloat16=209.5, float16=209.5, tf32=105)),
    GPU("L40S", 48, 350, dict(bfloat16=362, float16=362, tf32=183)),
    GPU("L4", 24, 72, dict(bfloat16=121, float16=121, tf32=60)),
    GPU("MI300X", 192, 750, dict(bfloat16=1307.4, float16=1307.4, tf32=654)),
)
OTHER_CHIPS = re.compile(r"\b(Ti|SUPER|D|Laptop|Max-Q|MIG)\b")  # after a name above, another chip or a slice of one
NO_SPARSITY = ("V100", "T4")


def find_gpu(name):
    """The `GPU` that a device name, as torch gives it, is of; None if it is not in the table."""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b", name)
                 and not OTHER_CHIPS.search(name)), None)


def find_gpu_by_alias(text):
    """The `GPU` that a person means: its name, some of its words ('H100', 'A100 40GB', '4090'), or what torch says."""
    def words(name):
        return set(re.split(r"[\s-]+", name.lower())) - {"nvidia", "geforce", "tesla", "amd", "instinct"}

    meant = words(text)
    exact = next((gpu for gpu in GPUS if gpu.name.lower() == text.lower()), None)
    return exact or next((gpu for gpu in GPUS if meant and meant <= words(gpu.name)), None) or find_gpu(text)


def look_up_peak(name, kind, sparse=False):
    """(peak in FLOP/s or None, one line of why) for a device name and bfloat16 | float16 | tf32 | float32."""
    gpu = find_gpu(name)
    if gpu is None:
        return None, f"no peak is known for {name!r} (set one with --mfu_peak=TFLOPS)"
    if kind not in gpu.peaks or (sparse and gpu.name.startswith(NO_SPARSITY)):
        return None, f"no {'sparse ' * sparse}{kind} peak is known for {name} (set one with --mfu_peak=TFLOPS)"
    return gpu.peaks[kind] * 1e12 * (2 if sparse else 1), f"{gpu.name}, {kind} {'2:4 sparse' if sparse else 'dense'}"


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
