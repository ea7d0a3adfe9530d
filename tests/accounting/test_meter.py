"""Step time, tokens/s and MFU of the steps since the last report, by a clock that the test sets."""

from types import SimpleNamespace

import pytest
import torch

from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.meter import StepMeter
from model_builder import build_model
from model_config import get_preset

SIZES = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=32)


@pytest.fixture
def clock():
    """A clock; clock.now is the time that the meter reads."""
    clock = SimpleNamespace(now=100.0)
    clock.time = lambda: clock.now
    return clock


def make(clock, world_size=1, peak_tflops=1e-6):
    runtime = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, tf32=False, world_size=world_size,
                              clock=clock)
    model = build_model(get_preset("llama", **SIZES))
    return model, StepMeter(model, SimpleNamespace(model=model.config, mfu_peak=peak_tflops), runtime, 64)


def step(meter, clock, seconds, profiled=False):
    clock.now += 1000.0  # between steps: evaluation, checkpoints
    meter.begin()
    clock.now += seconds
    assert meter.elapsed() == pytest.approx(seconds)
    meter.end(profiled)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_report_is_the_mean_of_its_steps_and_mfu_divides_by_all_devices(clock, world_size):
    model, meter = make(clock, world_size)
    for seconds in (1.0, 3.0):
        step(meter, clock, seconds)
    report = meter.report(pytest.fail)
    flops = flops_per_token(model, 8)["train"]
    assert report["step_time"] == pytest.approx(2.0) and report["tokens_per_sec"] == pytest.approx(32.0)
    assert report["tflops"] == pytest.approx(flops * 32 / 1e12)
    assert report["mfu"] == pytest.approx(flops * 32 / (1e6 * world_size))
    step(meter, clock, 5.0)
    assert meter.report(pytest.fail)["step_time"] == pytest.approx(5.0)  # only the steps since the last report


def test_profiled_steps_count_only_where_there_are_no_others(clock):
    _, meter = make(clock, peak_tflops=1.0)
    step(meter, clock, 9.0, profiled=True)
    step(meter, clock, 1.0)
    assert meter.report(pytest.fail)["step_time"] == pytest.approx(1.0)
    step(meter, clock, 9.0, profiled=True)
    assert meter.report(pytest.fail)["step_time"] == pytest.approx(9.0)


def test_an_impossible_mfu_is_one_warning_and_no_mfu_from_then_on(clock):
    _, meter = make(clock, peak_tflops=1e-9)
    warnings = []
    for _ in range(2):
        step(meter, clock, 1.0)
        assert meter.report(warnings.append)["mfu"] is None
    assert len(warnings) == 1 and "is too low" in warnings[0] and "--mfu_peak" in warnings[0]
