"""Traces, the share of communication, the allocator's history: what they say, and that they harm nothing."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, records, run_python
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import largest_file

from blockgpt.accounting.out_of_memory import out_of_memory_hint
from blockgpt.training import profiling
from blockgpt.training.profiling import Profile, memory_history, merged, shares, without

CPU = torch.device("cpu")
EQUAL = ("loss", "grad_norm", "lr", "tokens")


def runtime(rank=0, world_size=1, device="cpu"):
    return SimpleNamespace(rank=rank, world_size=world_size, is_main=rank == 0, device=torch.device(device),
                           all_gather_object=lambda value: [value] * world_size)


@pytest.fixture
def log(tmp_path):
    """A log that remembers what it was told: .said, .warnings."""
    said, warnings = [], []
    return SimpleNamespace(dir=tmp_path, say=said.append, warn=warnings.append, said=said, warnings=warnings)


def watching(log, steps=range(0), **of_machine):
    return Profile(SimpleNamespace(profiled_steps=lambda: steps), runtime(**of_machine), log)


def steps_of(profile, last, work=lambda: torch.ones(8, 8) @ torch.ones(8, 8)):
    """Run the steps 1 … last; those that were watched."""
    watched = []
    with profile:
        for step in range(1, last + 1):
            profile.begin(step)
            work()
            if profile.end(step):
                watched.append(step)
    return watched


def trace_of(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


# ---- which steps

def test_without_being_asked_nothing_is_watched(log, monkeypatch):
    monkeypatch.setattr(Profile, "_start", lambda *_, **__: pytest.fail("a profiler was started"))
    profile = watching(log)
    assert steps_of(profile, 1100) == [] and profile.communication() is None
    assert not list(log.dir.iterdir()) and not log.said


def test_communication_is_measured_at_the_same_steps_wherever_a_run_was_resumed(log):
    assert steps_of(watching(log, world_size=2), 1100) == [10, 510, 1010]
    profile = watching(log, world_size=2)
    for step in (510, 511, 512):  # just resumed: compiling
        profile.begin(step)
        assert profile.end(step) is False
    profile.begin(1010)
    assert profile.end(1010) is True and profile.communication() == [{"share": 0.0, "exposed": 0.0}] * 2
    assert profile.communication() is None


def test_a_trace_and_a_sample_of_the_same_step_do_not_meet(log):
    assert steps_of(watching(log, range(9, 12), world_size=2), 20) == [9, 10, 11]
    assert not log.warnings and trace_of(log.dir / "profile/rank-00000.json.gz")


# ---- the trace

def test_the_table_and_the_trace_hold_these_steps_alone(log, capfd):
    calls = iter([5, 1, 1, 5])

    def work():
        for _ in range(next(calls)):
            torch.ones(64, 64) @ torch.ones(64, 64)

    assert steps_of(watching(log, range(2, 4)), 4, work) == [2, 3]
    names = [event["name"] for event in trace_of(log.dir / "profile/rank-00000.json.gz") if event.get("ph") == "X"]
    assert names.count("aten::mm") == 2
    table = (log.dir / "profile/table.txt").read_text()
    assert table.rstrip() in log.said[0]
    header, *rows = table.splitlines()
    assert header.split() == ["operator", "ms", "share", "calls"] and len(rows) <= 10
    (mm,) = (row.split() for row in rows if row.startswith("aten::mm"))
    assert mm[3] == "2" and float(mm[1]) > 0
    assert [float(row.split()[1]) for row in rows] == sorted((float(row.split()[1]) for row in rows), reverse=True)
    assert sorted(p.name for p in (log.dir / "profile").iterdir()) == ["rank-00000.json.gz", "table.txt"]
    assert capfd.readouterr() == ("", "")  # the profiler's own messages are for nobody


def test_a_run_that_ends_within_the_trace_leaves_what_there_is(log):
    profile = watching(log, range(1, 100), rank=3, world_size=4)
    with pytest.raises(KeyboardInterrupt), profile:
        profile.begin(1)
        torch.ones(8, 8) @ torch.ones(8, 8)
        raise KeyboardInterrupt
    assert trace_of(log.dir / "profile/rank-00003.json.gz")
    assert not (log.dir / "profile/table.txt").exists() and not log.said  # the main process has it


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_the_trace_is_one_warning(log, capsys, rank):
    with largest_file(2000):
        assert steps_of(watching(log, range(2, 4), rank=rank, world_size=2), 12) == [2, 3]
    warnings = log.warnings + capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "the run goes on without" in warnings[0]
    assert not list((log.dir / "profile").iterdir())


def test_a_profiler_that_fails_is_one_warning(log, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUPTI\nis busy")
    monkeypatch.setattr(torch.autograd.profiler, "profile", fail)
    profile = watching(log, world_size=2)
    assert steps_of(profile, 1100) == []
    assert log.warnings == ["profile: CUPTI is busy: the run goes on without"]
    assert profile.communication() == [None, None]  # it was due: the other ranks ask


def test_ranks_ask_each_other_after_the_same_steps_whatever_fails_on_one(log, monkeypatch):
    def asked_after(profile):
        steps = []
        with profile:
            for step in range(1, 1100):
                profile.begin(step)
                profile.end(step)
                if profile.communication() is not None:
                    steps.append(step)
        return steps

    assert asked_after(watching(log, range(500, 600), world_size=2)) == [10, 1010]
    monkeypatch.setattr(Profile, "_start", lambda *_, **__: 1 / 0)
    assert asked_after(watching(log, range(500, 600), world_size=2)) == [10, 1010]


# ---- the share of communication

def on_cpu(name, start, end):
    return name, "cpu_op", start, end


def test_what_overlaps_is_counted_once_and_what_computation_covers_is_hidden():
    events = [on_cpu("gloo:all_reduce", 10, 40), on_cpu("gloo:all_reduce", 30, 60), on_cpu("aten::mm", 0, 20),
              on_cpu("aten::addmm", 5, 25), on_cpu("c10d::allreduce_", 22, 24), on_cpu("FSDP::all_gather", 0, 100)]
    assert shares(events, 100) == (0.5, 0.37)
    assert shares([], 100) == (0.0, 0.0)


def test_waiting_within_a_compiled_region_computes_nothing():
    events = [on_cpu("Torch-Compiled Region: 0/0", 0, 100), on_cpu("gloo:all_gather", 20, 50),
              on_cpu("_c10d_functional::wait_tensor", 30, 50)]
    assert shares(events, 100) == (0.3, 0.2)


def test_on_a_gpu_kernels_tell_everything():
    events = [("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel", 0, 40), ("ampere_sgemm", "kernel", 30, 90),
              ("nccl:all_reduce", "gpu_user_annotation", 0, 90), ("Memcpy HtoD", "gpu_memcpy", 0, 20)]
    assert shares(events, 100) == (0.4, 0.3)


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda s: tuple(sorted(s))), max_size=8)


@given(a=spans, b=spans)
def test_spans_are_sets_of_moments(a, b):
    def moments(spans):
        return {t for start, end in spans for t in range(start, end)}

    assert moments(merged(a)) == moments(a) and moments(without(merged(a), merged(b))) == moments(a) - moments(b)
    ends = [t for span in merged(a) for t in span]
    assert ends == sorted(ends) and sum(end - start for start, end in merged(a)) == len(moments(a))


# ---- train.py

def test_a_profiled_run_learns_the_same(tmp_path, train):
    assert train("plain", "--max_iters=6").returncode == 0
    done = train("traced", "--max_iters=6", "--profile=2:4")
    assert done.returncode == 0 and done.stderr == ""
    plain, traced = (records(tmp_path / "runs" / name) for name in ("plain", "traced"))
    assert [[r[k] for k in EQUAL] for r in plain.values()] == [[r[k] for k in EQUAL] for r in traced.values()]
    table = (tmp_path / "runs/traced/profile/table.txt").read_text()
    assert table in done.stdout and len(table.splitlines()) == 11
    assert "communication" not in traced[6] and "ranks" not in traced[6]


def test_two_processes_say_how_much_they_communicate(tmp_path, data_dir):
    done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *TINY,
                      f"--data_dir={data_dir}", "--run_name=two", "--max_iters=12", "--gradient_accumulation_steps=2",
                      "--profile=4:6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = records(tmp_path / "runs/two")
    assert [step for step in steps if "communication" in steps[step]] == [10]
    told = steps[10]["communication"]
    assert 0 < told["exposed"] <= told["share"] <= 1 and told["waited_for"] in (0, 1)
    for step in steps.values():
        assert len(step["ranks"]["step_time"]) == 2 and step["slowest_rank"] in (0, 1)
        assert step["memory"]["peak"] == max(step["ranks"]["memory_peak"])
    assert len(steps[10]["ranks"]["communication_share"]) == 2
    assert "communication" in next(line for line in done.stdout.splitlines() if line.startswith("step     10/"))
    run = json.loads((tmp_path / "runs/two/run.json").read_text())
    assert run["results"]["peak_memory"] == steps[12]["memory"]["peak"]
    for rank in (0, 1):
        assert any(event["name"].startswith("gloo:")
                   for event in trace_of(tmp_path / f"runs/two/profile/rank-{rank:05d}.json.gz"))
    table = run_python(ROOT / "compare_architectures.py", "--format=json", "runs/two", cwd=tmp_path)
    assert json.loads(table.stdout)["runs"][0]["peak_memory"] == max(s["memory"]["peak"] for s in steps.values())


STRAGGLER = """
import torch
import torch.distributed as dist
from types import SimpleNamespace
from blockgpt.training.profiling import Profile

dist.init_process_group("gloo")
rank = dist.get_rank()

def exchange(value):
    told = [None] * 2
    dist.all_gather_object(told, value)
    return told

machine = SimpleNamespace(rank=rank, world_size=2, is_main=rank == 0, device=torch.device("cpu"), exchange=exchange)
profile = Profile(SimpleNamespace(profiled_steps=lambda: range(0)), machine, None)
x = torch.ones(256, 256)
for step in range(1, 11):
    dist.barrier()
    profile.begin(step)
    for _ in range(20 + 400 * rank):
        x @ x
    dist.all_reduce(x.clone())
    profile.end(step)
told = profile.communication()
if rank == 0:
    print(told[0]["share"], told[0]["exposed"], told[1]["share"], told[1]["exposed"])
dist.destroy_process_group()
"""


def test_a_rank_that_the_others_wait_for_waits_least(tmp_path):
    (tmp_path / "straggler.py").write_text(STRAGGLER)
    done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "straggler.py")
    assert done.returncode == 0, done.stderr
    waiting, waiting_exposed, working, working_exposed = map(float, done.stdout.split())
    assert waiting > 0.5 > working and waiting_exposed > 0.5 > working_exposed


# ---- memory

@pytest.fixture
def allocator(monkeypatch):
    """torch's recording of the allocator, told apart from a GPU: the calls, in order."""
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **k: calls.append(k.get("enabled", True)))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("a snapshot"))
    return calls


@pytest.mark.parametrize("rank, name", [(0, "memory_snapshot.pickle"), (2, "memory_snapshot-00002.pickle")])
@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError, KeyboardInterrupt])
def test_the_allocators_history_is_left_whatever_ends_the_run(log, allocator, error, rank, name):
    config = SimpleNamespace(memory_snapshot=True)
    if error:
        with pytest.raises(error), memory_history(config, runtime(rank, 4, "cuda"), log):
            raise error
    else:
        with memory_history(config, runtime(rank, 4, "cuda"), log):
            pass
    assert [p.name for p in log.dir.iterdir()] == [name] and allocator == [True, None]


def test_a_history_that_cannot_be_written_does_not_hide_the_error(log, allocator, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    with (pytest.raises(torch.OutOfMemoryError),
          memory_history(SimpleNamespace(memory_snapshot=True), runtime(device="cuda"), log)):
        raise torch.OutOfMemoryError
    assert len(log.warnings) == 1 and "No space left on device: no memory snapshot" in log.warnings[0]


@pytest.mark.parametrize("asked, device, warnings", [(False, "cuda", 0), (True, "cpu", 1)])
def test_without_being_asked_or_without_cuda_nothing_is_recorded(log, allocator, asked, device, warnings):
    config = SimpleNamespace(memory_snapshot=asked, keys_without_effect=dict)
    with memory_history(config, runtime(device=device), log):
        pass
    assert allocator == [] and not list(log.dir.iterdir()) and len(log.warnings) == warnings


@pytest.mark.parametrize("state, advice", [
    ((16, 2, 1, "none", False, False), "halve batch_size (--batch_size=8), then double gradient_accumulation_steps "
     "(--gradient_accumulation_steps=4), then --activation_checkpointing=full"),
    ((15, 2, 1, "full", False, False), "--batch_size=5 with --gradient_accumulation_steps=6"),
    ((1, 8, 8, "selective", False, False), "--activation_checkpointing=full, then --use_zero1=True, then "
     "--use_fsdp=True"),
    ((1, 8, 8, "full", True, False), "--use_fsdp=True"),
    ((1, 8, 8, "full", False, True), "a smaller block_size, n_embd or n_layer, or more processes"),
    ((1, 1, 1, "full", False, False), "a smaller block_size, n_embd or n_layer, or more processes"),
])
def test_what_to_do_without_memory_in_order_and_only_what_is_left(state, advice):
    assert out_of_memory_hint(*state) == f"out of memory: {advice}"


def test_the_advice_leaves_the_step_what_it_is():
    for batch_size in range(2, 50):
        text = out_of_memory_hint(batch_size, 6, 2, "none", False, False)
        sizes = {key: int(text.split(f"--{key}=")[1].split()[0].strip("),"))
                 for key in ("batch_size", "gradient_accumulation_steps")}
        assert sizes["batch_size"] * sizes["gradient_accumulation_steps"] == batch_size * 6
        assert sizes["batch_size"] < batch_size and sizes["gradient_accumulation_steps"] % 2 == 0
    assert profiling.SAMPLE_FIRST > profiling.WARM
