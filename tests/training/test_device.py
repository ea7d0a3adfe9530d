"""Device, precision and memory of a process: what is chosen, and what is refused."""

import pytest
import torch

from blockgpt.errors import ConfigError
from blockgpt.training.device import choose_device, choose_dtype, cpu_name, process_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, bfloat16=True): let torch find `count` GPUs; without a call, none."""
    def set_gpus(count, bfloat16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    set_gpus(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return set_gpus


def test_auto_chooses_the_best_device_that_exists(gpus, monkeypatch):
    assert choose_device("auto", 0) == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", 0).type == "mps"
    gpus(2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)


def test_a_named_gpu_is_used_and_an_unnamed_one_is_that_of_the_local_rank(gpus):
    gpus(2)
    assert choose_device("cuda", 1) == choose_device("cuda:1", 0) == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:x", "cuda:-1", "cuda:99999999999999999999", "xpu", "cpu:"])
def test_an_unknown_device_is_an_error_that_lists_the_known_ones(gpus, name):
    with pytest.raises(ConfigError, match=r"^device: .* is unknown \(one of auto, cpu, cuda, cuda:1, mps\)"):
        choose_device(name, 0)


def test_a_device_that_does_not_exist_is_an_error_and_never_replaced(gpus):
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ConfigError, match=r"torch finds no .* \(--device=cpu\)"):
            choose_device(name, 0)
    gpus(2)
    with pytest.raises(ConfigError, match="'cuda:2' does not exist, this host has CUDA devices 0 to 1"):
        choose_device("cuda:2", 0)


def test_too_few_gpus_are_an_error_on_every_process(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for local_rank in range(4):
        with pytest.raises(ConfigError, match=r"4 processes need 4 GPUs, .* has 2 \(torchrun --nproc_per_node=2\)"):
            choose_device("auto", local_rank)
    with pytest.raises(ConfigError, match="one GPU for 4 processes"):
        choose_device("cuda:1", 0)
    assert choose_device("cpu", 3) == CPU


def test_auto_chooses_bfloat16_where_the_gpu_supports_it(gpus):
    assert choose_dtype("auto", CPU) == choose_dtype("auto", torch.device("mps")) == torch.float32
    gpus(1)
    assert choose_dtype("auto", CUDA) == torch.bfloat16
    gpus(1, bfloat16=False)
    assert choose_dtype("auto", CUDA) == torch.float32 and choose_dtype("float16", CUDA) == torch.float16


def test_a_precision_that_the_device_lacks_is_an_error(gpus):
    with pytest.raises(ConfigError, match="'float16' needs a CUDA device, this is cpu"):
        choose_dtype("float16", CPU)
    gpus(1, bfloat16=False)
    with pytest.raises(ConfigError, match="'bfloat16' is not supported by this GPU"):
        choose_dtype("bfloat16", CUDA)
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16 and choose_dtype("float32", CUDA) == torch.float32


def test_memory_is_that_of_this_process():
    before = process_memory()
    tensor = torch.ones(2**24)  # 64 MiB
    after = process_memory()
    assert after["allocated"] - before["allocated"] > tensor.nbytes / 2
    assert after["peak"] >= after["allocated"] and after["reserved"] is None


def test_the_cpu_has_a_name():
    assert cpu_name()
