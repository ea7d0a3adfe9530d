"""Traces, the cost of communication, the allocator's history: what they report, and that they change no run."""

import contextlib
import gzip
import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from checkpoint_helpers import largest_file
from conftest import ROOT, TINY, records, run_python
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from blockgpt.training import launch, profiling
from blockgpt.training.profiling import StepProfiler, communication_fractions, difference, memory_history, union
from configurator import load_config


def runtime(rank=0, world_size=1, device="cpu"):
    return SimpleNamespace(rank=rank, world_size=world_size, is_rank_zero=rank == 0, device=torch.device(device),
                           all_gather_object=lambda value: [value] * world_size)


@pytest.fixture
def log(tmp_path):
    """A log with its lines in .lines and .warnings."""
    lines, warnings = [], []
    return SimpleNamespace(dir=tmp_path, info=lines.append, warning=warnings.append, lines=lines, warnings=warnings)


def new_profile(log, traced_steps=range(0), **fields):
    return StepProfiler(SimpleNamespace(profiled_steps=lambda: traced_steps), runtime(**fields), log)


def matmul():
    return torch.ones(8, 8) @ torch.ones(8, 8)


def recorded_steps(profile, last, work=matmul):
    """Run steps 1 to `last`; returns those that were recorded."""
    recorded = []
    with profile:
        for step in range(1, last + 1):
            profile.begin(step)
            work()
            if profile.end(step):
                recorded.append(step)
    return recorded


def trace_events(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


# ---- which steps

def test_by_default_no_step_is_recorded(log, monkeypatch):
    for name in ("_start_trace", "_start_profiler"):
        monkeypatch.setattr(StepProfiler, name, lambda *_: pytest.fail("a profiler was started"))
    profile = new_profile(log)
    assert recorded_steps(profile, 1100) == [] and profile.communication() is None
    assert not list(log.dir.iterdir()) and not log.lines


def test_communication_is_measured_at_the_same_steps_wherever_a_run_was_resumed(log):
    assert recorded_steps(new_profile(log, world_size=2), 1100) == [10, 510, 1010]
    profile = new_profile(log, world_size=2)
    for step in (510, 511, 512):  # the first steps of the process compile
        profile.begin(step)
        assert profile.end(step) is False
    profile.begin(1010)
    assert profile.end(1010) is True and profile.communication() == [{"share": 0.0, "exposed": 0.0}] * 2
    assert profile.communication() is None
    assert profiling.FIRST_MEASURED_STEP > profiling.WARMUP_STEPS


def test_a_step_of_the_trace_is_not_measured(log):
    assert recorded_steps(new_profile(log, range(9, 12), world_size=2), 20) == [9, 10, 11]
    assert not log.warnings and trace_events(log.dir / "profile/rank-00000.json.gz")


def test_ranks_gather_after_the_same_steps_even_if_one_fails_to_measure(log, monkeypatch):
    def gathered_after(profile):
        steps = []
        with profile:
            for step in range(1, 1100):
                profile.begin(step)
                profile.end(step)
                if profile.communication() is not None:
                    steps.append(step)
        return steps

    assert gathered_after(new_profile(log, range(500, 600), world_size=2)) == [10, 1010]
    for name in ("_start_trace", "_start_profiler"):
        monkeypatch.setattr(StepProfiler, name, lambda *_: 1 / 0)
    assert gathered_after(new_profile(log, range(500, 600), world_size=2)) == [10, 1010]


# ---- the trace

def test_the_table_and_the_trace_contain_the_selected_steps_only(log, capfd):
    products = iter([5, 1, 1, 5])

    def work():
        for _ in range(next(products)):
            torch.ones(64, 64) @ torch.ones(64, 64)

    assert recorded_steps(new_profile(log, range(2, 4)), 4, work) == [2, 3]
    events = trace_events(log.dir / "profile/rank-00000.json.gz")
    assert [event["name"] for event in events if event.get("ph") == "X"].count("aten::mm") == 2
    table = (log.dir / "profile/table.txt").read_text()
    assert table.rstrip() in log.lines[0]
    header, *rows = table.splitlines()
    assert header.split() == ["operator", "ms", "share", "calls"] and len(rows) <= 10
    (mm,) = (row.split() for row in rows if row.startswith("aten::mm"))
    assert mm[3] == "2" and float(mm[1]) > 0
    assert [float(row.split()[1]) for row in rows] == sorted((float(row.split()[1]) for row in rows), reverse=True)
    assert sorted(p.name for p in (log.dir / "profile").iterdir()) == ["rank-00000.json.gz", "table.txt"]
    assert capfd.readouterr() == ("", "")  # kineto prints nothing


def test_a_run_that_ends_within_the_trace_writes_what_was_recorded(log):
    profile = new_profile(log, range(1, 100), rank=3, world_size=4)
    with pytest.raises(KeyboardInterrupt), profile:
        profile.begin(1)
        matmul()
        raise KeyboardInterrupt
    assert trace_events(log.dir / "profile/rank-00003.json.gz")
    assert not (log.dir / "profile/table.txt").exists() and not log.lines  # only rank zero writes it


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_one_warning(log, capsys, rank):
    with largest_file(2000):
        assert recorded_steps(new_profile(log, range(2, 4), rank=rank, world_size=2), 12) == [2, 3]
    warnings = log.warnings + capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "the run continues without it" in warnings[0]
    assert not list((log.dir / "profile").iterdir())


def test_a_failing_profiler_is_one_warning(log, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUPTI\nis busy")
    monkeypatch.setattr(torch.autograd.profiler, "profile", fail)
    profile = new_profile(log, world_size=2)
    assert recorded_steps(profile, 1100) == []
    assert log.warnings == ["profile: CUPTI is busy: the run continues without it"]
    assert profile.communication() == [None, None]  # the other ranks gather


# ---- the cost of communication

def on_cpu(name, start, end):
    return name, "cpu_op", start, end


def test_overlapping_communication_counts_once_and_computation_hides_it():
    events = [on_cpu("gloo:all_reduce", 10, 40), on_cpu("gloo:all_reduce", 30, 60), on_cpu("aten::mm", 0, 20),
              on_cpu("aten::addmm", 5, 25), on_cpu("c10d::allreduce_", 22, 24), on_cpu("FSDP::all_gather", 0, 100)]
    assert communication_fractions(events, 100) == (0.5, 0.37)
    assert communication_fractions([], 100) == (0.0, 0.0)


def test_waiting_within_a_compiled_region_is_no_computation():
    events = [on_cpu("Torch-Compiled Region: 0/0", 0, 100), on_cpu("gloo:all_gather", 20, 50),
              on_cpu("_c10d_functional::wait_tensor", 30, 50)]
    assert communication_fractions(events, 100) == (0.3, 0.2)


def test_on_a_gpu_only_kernels_count():
    events = [("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel", 0, 40), ("ampere_sgemm", "kernel", 30, 90),
              ("nccl:all_reduce", "gpu_user_annotation", 0, 90), ("Memcpy HtoD", "gpu_memcpy", 0, 20)]
    assert communication_fractions(events, 100) == (0.4, 0.3)


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda s: tuple(sorted(s))), max_size=8)


@given(a=intervals, b=intervals)
def test_union_and_difference_of_intervals_are_those_of_sets(a, b):
    def points(intervals):
        return {t for start, end in intervals for t in range(start, end)}

    assert points(union(a)) == points(a)
    assert points(difference(union(a), union(b))) == points(a) - points(b)
    ends = [t for interval in union(a) for t in interval]
    assert ends == sorted(ends) and sum(end - start for start, end in union(a)) == len(points(a))


# ---- runs

@pytest.mark.slow
def test_a_profiled_run_has_the_same_losses(tmp_path, train):
    assert train("plain", "--max_iters=6").returncode == 0
    done = train("traced", "--max_iters=6", "--profile=2:4")
    assert done.returncode == 0 and done.stderr == ""
    plain, traced = ([[r[key] for key in ("loss", "grad_norm", "lr", "tokens")] for r in
                      records(tmp_path / "runs" / name).values()] for name in ("plain", "traced"))
    assert plain == traced
    table = (tmp_path / "runs/traced/profile/table.txt").read_text()
    assert table in done.stdout and len(table.splitlines()) == 11
    last = records(tmp_path / "runs/traced")[6]
    assert "communication" not in last and "ranks" not in last


def run_train_py(argv, folder):
    """train.py on one rank; its output in rank<N>.txt."""
    os.chdir(folder)
    sys.argv = [str(ROOT / "train.py"), *argv]
    with open(f"rank{os.environ['RANK']}.txt", "w") as output, contextlib.redirect_stdout(output):
        runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.slow
def test_two_processes_report_their_communication(tmp_path, data_dir):
    run_ranks(2, run_train_py, [*TINY, f"--data_dir={data_dir}", "--run_name=two", "--max_iters=12",
                                "--gradient_accumulation_steps=2", "--profile=4:6"], tmp_path)
    steps = records(tmp_path / "runs/two")
    assert [step for step in steps if "communication" in steps[step]] == [10]
    communication = steps[10]["communication"]
    assert 0 < communication["exposed"] <= communication["share"] <= 1 and communication["waited_for"] in (0, 1)
    for step in steps.values():
        assert len(step["ranks"]["step_time"]) == 2 and step["slowest_rank"] in (0, 1)
        assert step["memory"]["peak"] == max(step["ranks"]["memory_peak"])
    assert len(steps[10]["ranks"]["communication_share"]) == 2
    output = (tmp_path / "rank0.txt").read_text()
    assert "communication" in next(line for line in output.splitlines() if line.startswith("step     10/"))
    run = json.loads((tmp_path / "runs/two/run.json").read_text())
    assert run["results"]["peak_memory"] == steps[12]["memory"]["peak"]
    for rank in (0, 1):
        assert any(event["name"].startswith("gloo:")
                   for event in trace_events(tmp_path / f"runs/two/profile/rank-{rank:05d}.json.gz"))
    table = run_python(ROOT / "compare_architectures.py", "--format=json", "runs/two", cwd=tmp_path)
    assert json.loads(table.stdout)["runs"][0]["peak_memory"] == max(s["memory"]["peak"] for s in steps.values())


def check_straggler():
    runtime = launch.init(load_config(["--device=cpu", "--gradient_accumulation_steps=2"]))
    profile = StepProfiler(SimpleNamespace(profiled_steps=lambda: range(0)), runtime, None)
    x = torch.ones(256, 256)
    for step in range(1, 11):
        dist.barrier()
        profile.begin(step)
        for _ in range(20 + 400 * runtime.rank):
            x @ x
        dist.all_reduce(x.clone())
        profile.end(step)
    waiting, straggler = profile.communication()
    assert waiting["share"] > 0.5 > straggler["share"], (waiting, straggler)
    assert waiting["exposed"] > 0.5 > straggler["exposed"], (waiting, straggler)
    launch.shutdown()


@pytest.mark.slow
def test_the_straggler_waits_least():
    run_ranks(2, check_straggler)


# ---- memory

@pytest.fixture
def allocator(monkeypatch):
    """Replaces torch's recording of the allocator; the list of its calls."""
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **k: calls.append(k.get("enabled", True)))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("a snapshot"))
    return calls


@pytest.mark.parametrize("rank, name", [(0, "memory_snapshot.pickle"), (2, "memory_snapshot-00002.pickle")])
@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError, KeyboardInterrupt])
def test_the_allocators_history_is_written_however_the_run_ends(log, allocator, error, rank, name):
    config = SimpleNamespace(memory_snapshot=True)
    with pytest.raises(error) if error else contextlib.nullcontext():  # noqa: SIM117 (the order matters)
        with memory_history(config, runtime(rank, 4, "cuda"), log):
            if error:
                raise error
    assert [p.name for p in log.dir.iterdir()] == [name] and allocator == [True, None]


def test_a_snapshot_that_cannot_be_written_does_not_hide_the_error(log, allocator, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    with (pytest.raises(torch.OutOfMemoryError),
          memory_history(SimpleNamespace(memory_snapshot=True), runtime(device="cuda"), log)):
        raise torch.OutOfMemoryError
    assert len(log.warnings) == 1 and "No space left on device: no memory snapshot" in log.warnings[0]


@pytest.mark.parametrize("memory_snapshot, device", [(False, "cuda"), (True, "cpu")])
def test_without_the_key_or_without_cuda_nothing_is_recorded(log, allocator, memory_snapshot, device):
    with memory_history(SimpleNamespace(memory_snapshot=memory_snapshot), runtime(device=device), log):
        pass
    assert allocator == [] and not list(log.dir.iterdir()) and not log.warnings
