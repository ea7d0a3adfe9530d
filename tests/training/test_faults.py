"""Faults from outside: signals, ranks that die or hang, values that are not finite on one rank."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, records
from ranks import start_train

import blockgpt.training.faults as faults
from blockgpt.errors import DataError, PeerLostError
from blockgpt.training.faults import Watchdog, is_broken_connection
from blockgpt.training.launch import Runtime
from configurator import load_config

CPU = torch.device("cpu")


def new_watchdog():
    return Watchdog(Runtime(0, 0, 1, CPU, torch.float32, False, False), load_config([]))


# ---- one process

class FakeLog:
    """What a `Watchdog` tells the run's log."""

    def __init__(self):
        self.lines, self.status = [], None

    def info(self, text):
        self.lines.append(text)

    def ended(self, status, reason):
        self.status = (status, reason)


@pytest.fixture
def watchdog(monkeypatch):
    """A watchdog, not entered, with a log. Its exit from the process raises SystemExit."""
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(faults.os, "_exit", leave)
    watchdog = new_watchdog()
    watchdog.log = FakeLog()
    return watchdog


def test_the_first_signal_asks_for_a_stop_and_says_so_and_a_later_one_ends_the_process(watchdog, capsys):
    for first in (signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
        for last in (signal.SIGINT, signal.SIGTERM):
            watchdog.log, watchdog.stop_requested = FakeLog(), None
            with watchdog.training():
                assert watchdog.gather_status().stop_reason is None
                watchdog._on_signal(first, 10.0)
                assert watchdog.gather_status().stop_reason == first.name
                assert watchdog.log.lines == [f"{first.name}: stopping after this step and saving; again to leave now"]
                watchdog._on_signal(signal.SIGTERM, 10.9)  # the same signal, passed on by torchrun
                watchdog._on_signal(signal.SIGXCPU, 12.0)  # the kernel repeats it every second
                watchdog._on_signal(signal.SIGHUP, 12.0)  # from the shell, then from the kernel
                assert watchdog.log.status is None and watchdog.gather_status().stop_reason == first.name
                with pytest.raises(SystemExit) as left:
                    watchdog._on_signal(last, 11.2)
                assert left.value.code == 128 + last
                assert watchdog.log.status == ("interrupted", f"{last.name} at step 0 in phase {watchdog.phase}, "
                                                              "not saved")
                assert f"interrupted by {last.name}" in capsys.readouterr().err


def test_before_training_the_first_signal_ends_the_process(watchdog):
    with pytest.raises(SystemExit) as left:
        watchdog._on_signal(signal.SIGTERM, 0.0)
    assert left.value.code == 128 + signal.SIGTERM and watchdog.log.status[0] == "interrupted"


def test_signals_reach_the_watchdog_until_it_exits():
    before = signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    with new_watchdog() as watchdog, watchdog.training():
        signal.raise_signal(signal.SIGUSR2)
        wait_until(lambda: watchdog.gather_status().stop_reason == "SIGUSR2")
    assert signal.signal(signal.SIGUSR2, before) == signal.SIG_DFL


def wait_until(condition):
    """Return when `condition()` is true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_exit_of_torchrun_asks_for_a_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(faults, "HEARTBEAT_SECONDS", 0.01)
    with new_watchdog() as watchdog, watchdog.training():
        assert watchdog.gather_status().stop_reason is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        wait_until(lambda: watchdog.gather_status().stop_reason == "the exit of torchrun")


def test_the_status_of_one_process():
    with new_watchdog() as watchdog:
        status = watchdog.gather_status([1.0, 2.5], step_time=0.25, memory_peak=7, save_finished=True)
        assert (status.loss, status.nonfinite_micro_steps, status.stop_reason) == (3.5, [-1], None)
        assert status.save_finished is True and status.step_times == [0.25] and status.memory_peaks == [7]


@pytest.mark.parametrize("micro_losses, grad_norm, nonfinite", [
    ([1.0, 2.0], 2.0, -1), ([1.0, float("nan"), float("inf")], 0.0, 1), ([float("-inf")], 0.0, 0),
    ([1.0, float("nan")], float("nan"), 1), ([1.0, 2.0], float("inf"), 0)])
def test_the_first_micro_batch_that_is_not_finite_is_named(micro_losses, grad_norm, nonfinite):
    with new_watchdog() as watchdog:
        assert watchdog.gather_status(micro_losses, grad_norm=grad_norm).nonfinite_micro_steps == [nonfinite]


def test_a_single_process_raises_its_errors_unchanged():
    for error in (DataError("x"), RuntimeError("shape '[2]' is invalid"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, new_watchdog() as watchdog, watchdog.training():
            raise error
        assert raised.value is error


def test_a_broken_connection_is_distinguished_from_other_errors():
    assert is_broken_connection(RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert is_broken_connection(torch.distributed.DistBackendError("NCCL error"))
    assert not is_broken_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_only_a_phase_that_has_finished_once_has_the_short_timeout():
    watchdog = new_watchdog()
    watchdog.config = load_config(["--rank_timeout=60", "--save_timeout=90"])
    watchdog.enter_phase("step", 1)
    assert watchdog._timeout() == faults.FIRST_CALL_TIMEOUT
    watchdog.enter_phase("save")
    assert watchdog._timeout() == 90
    watchdog.enter_phase("step", 2)
    assert watchdog._timeout() == 60


# ---- several processes

def wait_for_step(run_dir: Path, step: int) -> None:
    """Return when the log of a run has reached `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and max(records(run_dir), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {run_dir}")


class Run:
    """Two ranks of an endless run that has reached step 5."""

    def __init__(self, folder: Path, data_dir: Path, *flags: str) -> None:
        self.folder, self.dir = folder, folder / "runs/endless"
        self.ranks = start_train(2, [*TINY, f"--data_dir={data_dir}", "--run_name=endless", "--max_iters=100000",
                                     "--eval_interval=100000", "--gradient_accumulation_steps=2", *flags], folder)
        wait_for_step(self.dir, 5)

    def send(self, sent: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.ranks[rank].pid, sent)

    def wait(self, rank: int) -> tuple[int | None, str]:
        """The exit code of a rank, and its stderr."""
        self.ranks[rank].join(60)
        return self.ranks[rank].exitcode, (self.folder / f"rank{rank}.err").read_text()

    def record(self) -> dict:
        return json.loads((self.dir / "run.json").read_text())


@pytest.fixture
def endless(tmp_path, data_dir):
    """endless(*flags) -> a `Run`, whose ranks are killed at the end of the test."""
    runs = []

    def start(*flags: str) -> Run:
        runs.append(Run(tmp_path, data_dir, *flags))
        return runs[-1]

    yield start
    for run in runs:
        for process in run.ranks:
            process.kill()
            process.join()


def error_line(stderr: str) -> str:
    return next(line for line in stderr.splitlines() if line.startswith("error: "))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_other(endless, killed):
    run = endless()
    run.send(signal.SIGKILL, killed)
    exit_code, stderr = run.wait(1 - killed)
    assert exit_code == PeerLostError.exit_code
    line = error_line(stderr)
    assert f"error: rank {1 - killed} at step " in line and "in phase step: communication broke" in line
    if killed == 1:  # without torchrun the store is in rank zero, and ends with it
        assert "lost rank 1, last heartbeat at step " in line
        assert run.record()["status"] == "failed" and "lost rank 1" in run.record()["status_reason"]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_the_stacks(endless):
    run = endless("--rank_timeout=3")
    run.send(signal.SIGSTOP, 1)
    exit_code, stderr = run.wait(0)
    assert exit_code == PeerLostError.exit_code
    line = error_line(stderr)
    assert "error: rank 0 at step " in line and "no progress for " in line
    assert "lost rank 1, last heartbeat at step " in line
    assert "most recent call first" in stderr and "in train" in stderr
    assert run.record()["status"] == "failed" and "lost rank 1" in run.record()["status_reason"]


@pytest.mark.slow
@pytest.mark.parametrize("sent, ranks", [(signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1])])
def test_a_signal_to_one_or_all_stops_all_at_the_same_step(endless, sent, ranks):
    run = endless()
    run.send(sent, *ranks)
    outcomes = [run.wait(rank) for rank in (0, 1)]
    assert [exit_code for exit_code, _ in outcomes] == [0, 0], outcomes
    record = run.record()
    assert record["status"] == "interrupted" and record["status_reason"].startswith(f"{sent.name} at step ")
    assert f"step_{record['results']['step']:08d}" in [p.name for p in (run.dir / "checkpoints").iterdir()]


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_waits_for_a_peer_and_the_run_is_recorded(endless):
    run = endless()
    run.send(signal.SIGSTOP, 1)
    for _ in range(3):
        run.send(signal.SIGINT, 0)
        time.sleep(0.6)
    assert run.wait(0)[0] == 128 + signal.SIGINT
    record = run.record()
    assert record["status"] == "interrupted" and record["status_reason"].startswith("SIGINT at step ")
    assert "stopping after this step and saving; again to leave now" in (run.folder / "rank0.out").read_text()


@pytest.mark.slow
def test_a_pause_of_all_ranks_is_neither_silence_nor_step_time(endless):
    run = endless("--rank_timeout=3", "--save_timeout=3")
    run.send(signal.SIGSTOP, 0, 1)
    time.sleep(8)
    step = max(records(run.dir))
    run.send(signal.SIGCONT, 0, 1)
    wait_for_step(run.dir, step + 20)
    run.send(signal.SIGTERM, 0, 1)
    assert [run.wait(rank)[0] for rank in (0, 1)] == [0, 0] and run.record()["status"] == "interrupted"
    assert max(record["step_time"] for record in records(run.dir).values()) < 4
    assert "paused for " in (run.folder / "rank0.out").read_text()
