"""What happens to a run from outside: signals, peers that die or stand still, values that are not finite on one."""

import json
import signal
import time

import pytest
import torch
from conftest import records

import blockgpt.training.faults as faults
from blockgpt.errors import DataError, PeerLostError
from blockgpt.training.faults import Watchdog, is_broken_connection
from blockgpt.training.launch import Runtime
from configurator import load_config

CPU = torch.device("cpu")


def watchdog():
    return Watchdog(Runtime(0, 0, 1, CPU, torch.float32, False, False), load_config([]))


# ---- one process

@pytest.fixture
def clock(monkeypatch):
    """The time that Watch sees. Where SIGTERM would end the tests, it is a KeyboardInterrupt too."""
    time = [0.0]
    monkeypatch.setattr(faults.time, "monotonic", lambda: time[0])
    # All, as a job in the background starts with Ctrl-C ignored.
    before = {s: signal.signal(s, signal.default_int_handler) for s in Watchdog.SIGNALS}
    yield time
    found = [signal.getsignal(s) for s in Watchdog.SIGNALS]
    for s, handler in before.items():
        signal.signal(s, handler)
    assert found == [signal.default_int_handler] * 3


@pytest.mark.parametrize("first", Watchdog.SIGNALS)
@pytest.mark.parametrize("last", Watchdog.SIGNALS)
def test_the_first_signal_is_noted_and_one_after_it_ends_the_process(clock, first, last):
    with watchdog() as w, w.training():
        assert w.agree().stop is None
        signal.raise_signal(first)
        assert w.agree().stop == first.name
        clock[0] = 0.9
        signal.raise_signal(signal.SIGTERM)  # the same wish, passed on by torchrun
        signal.raise_signal(signal.SIGINT)
        assert w.agree().stop == first.name
        clock[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(last)


def test_signals_are_wishes_while_training_alone(clock):
    with watchdog() as w:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with w.training():
            assert signal.getsignal(signal.SIGTERM) != signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler


def test_one_process_agrees_with_itself():
    with watchdog() as w:
        known = w.agree([1.0, 2.5], 0.25, 7, saved=True)
        assert (known.loss, known.bad, known.stop) == (3.5, [-1], None)
        assert known.saved is True and known.step_times == [0.25] and known.memory == [7]
        assert w.agree([1.0, float("nan"), float("inf")]).bad == [1] and w.agree([float("-inf")]).bad == [0]
        assert w.agree([1.0, float("nan")], grad_norm=float("nan")).bad == [1]
        assert w.agree([1.0, 2.0], grad_norm=float("inf")).bad == [0] and w.agree([1.0], grad_norm=2.0).bad == [-1]


def test_an_error_of_one_process_stays_what_it_is():
    for error in (DataError("x"), RuntimeError("shape '[2]' is invalid"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, watchdog() as w, w.training():
            raise error
        assert raised.value is error
    assert is_broken_connection(RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert is_broken_connection(torch.distributed.DistBackendError("NCCL error"))
    assert not is_broken_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# ---- several processes

def wait_for(run_dir, step):
    """Until the log of a run has reached `step`."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if (run_dir / "metrics.jsonl").exists() and max(records(run_dir), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {run_dir}")


ENDLESS = ["--max_iters=100000", "--eval_interval=100000", "--gradient_accumulation_steps=2"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other(tmp_path, processes, victim):
    ranks = processes(2, "mine", *ENDLESS)
    wait_for(tmp_path / "runs/mine", 5)
    ranks[victim].kill()
    _, error = ranks[1 - victim].communicate(timeout=60)
    assert ranks[1 - victim].returncode == PeerLostError.exit_code
    line = next(x for x in error.splitlines() if x.startswith("error: "))
    assert f"error: rank {1 - victim} at step " in line and "in phase step: communication broke" in line
    # Without torchrun the store is rank 0's, and goes with it.
    assert f"lost rank {victim}, last heard of at step " in line or victim == 0
    if victim == 1:
        run = json.loads((tmp_path / "runs/mine/run.json").read_text())
        assert run["status"] == "failed" and "lost rank 1" in run["status_reason"]


def test_a_rank_that_stands_still_is_named_with_the_stacks(tmp_path, processes):
    ranks = processes(2, "mine", "--rank_timeout=3", *ENDLESS)
    wait_for(tmp_path / "runs/mine", 5)
    ranks[1].send_signal(signal.SIGSTOP)
    _, error = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == PeerLostError.exit_code
    line = next(x for x in error.splitlines() if x.startswith("error: "))
    assert "error: rank 0 at step " in line and "no progress for " in line and "lost rank 1, last heard of" in line
    assert "most recent call first" in error and "in train" in error
    run = json.loads((tmp_path / "runs/mine/run.json").read_text())
    assert run["status"] == "failed" and "lost rank 1" in run["status_reason"]


@pytest.mark.parametrize(("sent", "to"), [(signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1])])
def test_a_signal_to_one_or_all_stops_all_at_the_same_step(tmp_path, processes, sent, to):
    ranks = processes(2, "mine", *ENDLESS)
    wait_for(tmp_path / "runs/mine", 5)
    for rank in to:
        ranks[rank].send_signal(sent)
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    run = json.loads((tmp_path / "runs/mine/run.json").read_text())
    assert run["status"] == "interrupted" and run["status_reason"].startswith(f"{sent.name} at step ")
    assert f"step_{run['results']['step']:08d}" in [p.name for p in (tmp_path / "runs/mine/checkpoints").iterdir()]


def test_a_second_signal_ends_a_process_that_waits_for_a_peer(tmp_path, processes):
    ranks = processes(2, "mine", *ENDLESS)
    wait_for(tmp_path / "runs/mine", 5)
    ranks[1].send_signal(signal.SIGSTOP)
    ranks[0].send_signal(signal.SIGTERM)
    time.sleep(1.5)
    ranks[0].send_signal(signal.SIGTERM)
    ranks[0].communicate(timeout=30)
    assert ranks[0].returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
