"""Device capabilities: a table of GPUs with peak FLOP/s, memory and power, and the measured peak of a CPU.

To add a GPU: one line in `GPUS`, with the dense peaks of the vendor's data sheet.
"""

import re
import time
from typing import NamedTuple

import torch


class GPU(NamedTuple):
    """One row of the vendors' data sheets.

    Attributes:
        name: a sequence of whole words in torch.cuda.get_device_name().
        memory: in the vendor's GB, which are 2^30 bytes.
        watts: maximum board power.
        peaks: {dtype: dense TFLOP/s}; 2:4 sparsity doubles them.
    """

    name: str
    memory: int
    watts: int
    peaks: dict[str, float]


# The first match counts. A longer name comes before the shorter one that it contains, and the most common variant of a
# family before the others.
GPUS = (
    GPU("GB300", 279, 1400, dict(bfloat16=2500, float16=2500, tf32=1250)),
    GPU("GB200", 186, 1200, dict(bfloat16=2500, float16=2500, tf32=1250)),
    GPU("B300", 270, 1400, dict(bfloat16=2250, float16=2250, tf32=1125)),
    GPU("B200", 180, 1000, dict(bfloat16=2250, float16=2250, tf32=1125)),
    GPU("H200 NVL", 141, 600, dict(bfloat16=836, float16=836)),
    GPU("H200", 141, 700, dict(bfloat16=989.4, float16=989.4, tf32=494.7)),
    GPU("H20", 96, 400, dict(bfloat16=148, float16=148, tf32=74)),
    GPU("H100 80GB HBM3", 80, 700, dict(bfloat16=989.4, float16=989.4, tf32=494.7)),  # SXM
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
OTHER_CHIPS = re.compile(r"\b(Ti|SUPER|D|Laptop|Max-Q|MIG)\b")  # after a name above: another chip, or a slice of one
NO_SPARSITY = ("V100", "T4")
SET_PEAK = "set one with --mfu_peak=TFLOPS"


def find_gpu(device_name: str) -> GPU | None:
    """The row of a device name as torch reports it; None if it is not in the table."""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b", device_name)
                 and not OTHER_CHIPS.search(device_name)), None)


def find_gpu_by_alias(text: str) -> GPU | None:
    """The row of a GPU that a user names: its name, some words of it ('H100', 'A100 40GB', '4090'), or torch's name."""
    def words(name: str) -> set[str]:
        return set(re.split(r"[\s-]+", name.lower())) - {"nvidia", "geforce", "tesla", "amd", "instinct"}

    wanted = words(text)
    exact = next((gpu for gpu in GPUS if gpu.name.lower() == text.lower()), None)
    return exact or next((gpu for gpu in GPUS if wanted and wanted <= words(gpu.name)), None) or find_gpu(text)


def look_up_peak(device_name: str, precision: str, sparse: bool = False) -> tuple[float | None, str]:
    """(peak in FLOP/s or None, the reason in one line) of a GPU in bfloat16, float16, tf32 or float32."""
    gpu = find_gpu(device_name)
    if gpu is None:
        return None, f"no peak is known for {device_name!r} ({SET_PEAK})"
    if precision not in gpu.peaks or (sparse and gpu.name.startswith(NO_SPARSITY)):
        return None, f"no {'sparse ' * sparse}{precision} peak is known for {device_name} ({SET_PEAK})"
    source = f"{gpu.name}, {precision} {'2:4 sparse' if sparse else 'dense'}"
    return gpu.peaks[precision] * 1e12 * (2 if sparse else 1), source


def peak_flops(device: torch.device, dtype: torch.dtype, tf32: bool, mfu_peak: str | float) -> tuple[float | None, str]:
    """The peak that MFU divides by.

    Args:
        device: a CPU's peak is measured here; a device that is not in the table has none.
        dtype: of the matrix products.
        tf32: whether float32 products use TensorFloat-32.
        mfu_peak: 'dense', 'sparse', or a number of TFLOP/s.

    Returns:
        (peak of one device in FLOP/s or None, the reason in one line).
    """
    if isinstance(mfu_peak, str) and device.type == "cpu":
        threads = torch.get_num_threads()
        return measure_matmul(dtype), f"measured: a {dtype_name(dtype)} matrix product on {threads} CPU threads"
    if isinstance(mfu_peak, str) and device.type != "cuda":
        return None, f"no peak is known for {device.type} devices ({SET_PEAK})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return gpu_peak_flops(name, dtype, tf32, mfu_peak)


def gpu_peak_flops(device_name: str, dtype: torch.dtype, tf32: bool, mfu_peak: str | float) -> tuple[float | None, str]:
    """`peak_flops` of a GPU that need not be in this computer."""
    if not isinstance(mfu_peak, str):
        return mfu_peak * 1e12, "set by --mfu_peak"
    precision = "tf32" if dtype == torch.float32 and tf32 else dtype_name(dtype)
    return look_up_peak(device_name, precision, sparse=mfu_peak == "sparse")


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def measure_matmul(dtype: torch.dtype, n: int = 1024, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest of several n x n matrix products on the CPU."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    a @ b  # warm-up
    fastest, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        begin = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * n**3 / fastest
