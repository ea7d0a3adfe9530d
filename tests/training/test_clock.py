"""The clock that stands still while the process is stopped."""

from types import SimpleNamespace

import pytest

from blockgpt.training import clock as clock_module
from blockgpt.training.clock import RunningClock


@pytest.fixture
def system(monkeypatch):
    """The system's clocks: .now and .cpu, in seconds."""
    system = SimpleNamespace(now=100.0, cpu=7.0)
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: system.now)
    monkeypatch.setattr(clock_module.time, "process_time", lambda: system.cpu)
    return system


def test_a_pause_does_not_count_but_a_call_that_computes_does(system):
    clock = RunningClock()
    for _ in range(4):
        system.now += 0.5
        assert clock.time() == system.now - 100
    system.now += 3600  # stopped: no CPU time
    system.cpu += 0.01
    assert clock.time() == 2.0 and clock.paused == 3600
    system.now, system.cpu = system.now + 30, system.cpu + 30  # no thread could read the clock, but one has computed
    assert clock.time() == 32.0 and clock.paused == 3600
    system.now += clock_module.PAUSE_SECONDS  # a thread that was late
    assert clock.time() == 32.0 + clock_module.PAUSE_SECONDS
