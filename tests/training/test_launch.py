"""The processes of a run: how they join, what they exchange, how errors reach all of them."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from blockgpt.errors import CheckpointError, ConfigError, UserError
from blockgpt.training import launch
from blockgpt.training.faults import Watchdog
from blockgpt.training.launch import Runtime, check_same_config, run_on_all_ranks
from configurator import load_config
from training_logger import find_restarted_run

CPU = torch.device("cpu")


def single_process(**fields):
    return Runtime(0, 0, 1, CPU, torch.float32, False, False, **fields)


# ---- one process

def test_autocast_is_only_for_reduced_precision():
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with Runtime(0, 0, 1, CPU, dtype, False, False).autocast():
            assert (x @ x).dtype == dtype


def test_tensor_parallel_neighbours_have_the_same_dp_rank():
    runtimes = [Runtime(rank, rank, 6, CPU, torch.float32, False, False, tp_size=2) for rank in range(6)]
    assert [runtime.dp_rank for runtime in runtimes] == [0, 0, 1, 1, 2, 2]
    assert {runtime.dp_size for runtime in runtimes} == {3}


def test_the_collectives_of_one_process_return_its_own_values():
    runtime = single_process()
    assert runtime.all_reduce_sum(1, 0.5) == [1.0, 0.5] and runtime.all_gather([1, 2]) == [[1.0, 2.0]]
    assert runtime.all_gather_object({"a": (1,)}) == [{"a": (1,)}]
    assert runtime.on_rank_zero(lambda: 7) == 7 and run_on_all_ranks(runtime, lambda: 7) == [7]
    with pytest.raises(CheckpointError):
        runtime.on_rank_zero(lambda: fail(CheckpointError("none")))


def test_compiling_without_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"^compile: .*--compile=False"):
        launch.init(load_config(["--device=cpu", "--compile=True"]))
    assert not launch.init(load_config(["--device=cpu"])).compile


def test_processes_with_different_configs_end_with_the_key_that_differs():
    configs = [load_config([f"--learning_rate={lr}"]) for lr in (1, 1, 2)]
    runtime = SimpleNamespace(all_gather_object=lambda value: [config.flat() for config in configs])
    with pytest.raises(UserError, match=r"^learning_rate: is 2.0 on rank 2 and 1.0 on rank 0 .*the same command"):
        check_same_config(configs[0], runtime)
    configs.pop()
    check_same_config(configs[0], runtime)


# ---- restarts

def test_a_restart_continues_its_own_run_only(tmp_path):
    def restarted_run(launch_id, *flags):
        runtime = single_process(launch_id=launch_id, first_launch_id=launch_id and "a")
        return find_restarted_run(load_config([f"--out_dir={tmp_path}", *flags]), runtime)

    def write_run(name, launch_id):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "run.json").write_text(launch_id if launch_id == "{" else json.dumps({"launch": launch_id}))

    named = "--run_name=named"
    assert restarted_run(None, named) is None and restarted_run("a", named) is None
    assert restarted_run("b", named) == "named" and restarted_run("b") is None  # the first launch wrote no run
    write_run("other", "x")
    write_run("named", "a")
    assert restarted_run("b", named) == restarted_run("c", named) == restarted_run("b") == "named"
    assert restarted_run("a", named) is None and restarted_run("a") is None
    for launch_id in ("x", "{"):  # the directory is another run's
        write_run("named", launch_id)
        assert restarted_run("b", named) is None and restarted_run("b") is None


# ---- two processes

def fail(error):
    raise error


def check_collectives(runtime):
    rank = runtime.rank
    assert runtime.world_size == 2 and runtime.device.type == "cpu" and runtime.is_rank_zero == (rank == 0)
    assert runtime.all_reduce_sum(rank + 1, 0.25) == [3.0, 0.5]
    assert runtime.all_reduce_sum(2**53 if rank else 1 - 2**53) == [1.0]  # exact in float64
    assert runtime.all_gather([rank, 0.5]) == [[0.0, 0.5], [1.0, 0.5]]
    assert runtime.all_gather_object({"text": "ä" * rank}) == [{"text": ""}, {"text": "ä"}]


def check_on_rank_zero(runtime):
    rank = runtime.rank
    assert runtime.on_rank_zero(lambda: {"rank": rank}) == {"rank": 0}
    for error, error_type, exit_code in ((CheckpointError("none"), UserError, 3), (OSError(28, "full"), OSError, None)):
        with pytest.raises(error_type) as raised:
            runtime.on_rank_zero(lambda error=error: fail(error))
        assert getattr(raised.value, "exit_code", None) == exit_code and str(error) in str(raised.value)


def check_run_on_all_ranks(runtime):
    rank = runtime.rank
    assert run_on_all_ranks(runtime, lambda: rank) == [0, 1]
    for failing in ([1], [0, 1]):
        with pytest.raises(OSError, match="full") as raised:
            run_on_all_ranks(runtime, lambda: fail(OSError(28, "full")) if rank in failing else None)  # noqa: B023
        assert ("also on rank 1" in str(raised.value)) == (failing == [0, 1])
        assert str(raised.value).startswith(f"rank {failing[0]}: ")
    with pytest.raises(CheckpointError, match=r"^damaged$"):
        run_on_all_ranks(runtime, lambda: fail(CheckpointError("damaged")) if rank else None)
    with pytest.raises(ZeroDivisionError if rank else OSError, match="division"):
        run_on_all_ranks(runtime, lambda: 1 // 0 if rank else None)


def check_status(runtime, config):
    rank = runtime.rank
    with Watchdog(runtime, config) as watchdog, watchdog.training():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while watchdog.stop_requested is None:  # set by its thread
                time.sleep(0.01)
        status = watchdog.gather_status([1.0, float("nan")] if rank else [0.25, 0.5], step_time=rank,
                                        memory_peak=10 * rank, save_finished=rank == 1)
        assert status.stop_reason == "SIGTERM" and status.nonfinite_micro_steps == [-1, 1]
        assert status.loss != status.loss and not status.save_finished
        assert status.step_times == [0.0, 1.0] and status.memory_peaks == [0.0, 10.0]
        status = watchdog.gather_status([0.5], grad_norm=float("inf") if rank else 1.0)
        assert status.grad_norms == [1.0, float("inf")] and status.nonfinite_micro_steps == [-1, 0]
        assert status.loss == 1.0


def two_ranks():
    config = load_config(["--device=cpu", "--gradient_accumulation_steps=2"])
    runtime = launch.init(config)
    check_collectives(runtime)
    check_on_rank_zero(runtime)
    check_run_on_all_ranks(runtime)
    check_status(runtime, config)
    launch.shutdown()


@pytest.mark.slow
def test_two_processes_exchange_values_and_errors():
    run_ranks(2, two_ranks)
