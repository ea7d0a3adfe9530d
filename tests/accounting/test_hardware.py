"""The table of GPUs: which row a name means, which peak it has, and what happens where none is known."""

import pytest
import torch

from blockgpt.accounting.hardware import GPUS, dtype_name, find_gpu_by_alias, gpu_peak_flops, look_up_peak, peak_flops


@pytest.mark.parametrize("device_name, precision, tflops", [
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
def test_a_device_name_has_the_peak_of_its_row(device_name, precision, tflops):
    peak, source = look_up_peak(device_name, precision)
    assert peak == tflops * 1e12 and "dense" in source


@pytest.mark.parametrize("device_name, precision", [
    ("NVIDIA H900", "bfloat16"), ("NVIDIA GH200 480GB", "bfloat16"), ("NVIDIA L40", "bfloat16"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"), ("NVIDIA GeForce RTX 3090 Ti", "bfloat16"),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"), ("NVIDIA RTX A1000", "bfloat16"), ("NVIDIA T400", "float16"),
    ("NVIDIA B200", "float32"), ("Tesla V100-SXM2-16GB", "bfloat16"),
])
def test_an_unknown_device_has_no_peak_and_one_line_says_so(device_name, precision):
    peak, reason = look_up_peak(device_name, precision)
    assert peak is None and device_name in reason and "--mfu_peak" in reason and "\n" not in reason


def test_sparse_and_given_peaks():
    assert look_up_peak("NVIDIA B200", "bfloat16", sparse=True)[0] == 4500e12
    assert look_up_peak("Tesla T4", "float16", sparse=True)[0] is None
    assert gpu_peak_flops("NVIDIA B200", torch.float32, True, "sparse")[0] == 2250e12  # tf32
    assert peak_flops(torch.device("cpu"), torch.float32, False, 1.5) == (1.5e12, "set by --mfu_peak")
    assert peak_flops(torch.device("mps"), torch.float32, False, "dense")[0] is None


def test_the_peak_of_a_cpu_is_measured():
    measured, source = peak_flops(torch.device("cpu"), torch.float32, False, "dense")
    assert measured > 1e8 and "measured: a float32 matrix product" in source


@pytest.mark.parametrize("alias, name", [
    ("B200", "B200"), ("nvidia b200", "B200"), ("H100", "H100 80GB HBM3"), ("h100 pcie", "H100 PCIe"),
    ("A100", "A100"), ("A100 40GB", "A100-SXM4-40GB"), ("A100 PCIe", "A100 80GB PCIe"), ("4090", "RTX 4090"),
    ("V100", "V100-SXM2-32GB"), ("Tesla V100-PCIE-16GB", "V100-PCIE"), ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
    ("L4", "L4"), ("L40S", "L40S"), ("H20", "H20"), ("NVIDIA GeForce RTX 3090 Ti", None), ("H900", None), ("-", None),
])
def test_a_gpu_is_found_by_what_people_call_it(alias, name):
    gpu = find_gpu_by_alias(alias)
    assert (gpu and gpu.name) == name


def test_every_gpu_of_the_table_is_found_by_its_own_name():
    for gpu in GPUS:
        assert find_gpu_by_alias(gpu.name) == gpu and gpu.memory > 0 and gpu.watts > 0


def test_every_peak_of_the_table_is_found_for_its_dtype():
    for gpu in GPUS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            precision = "tf32" if dtype == torch.float32 else dtype_name(dtype)
            peak, _ = gpu_peak_flops(gpu.name, dtype, True, "dense")
            assert peak == (gpu.peaks[precision] * 1e12 if precision in gpu.peaks else None)
