"""Profiling of time and memory: traces, the cost of communication, the history of the allocator.

The profilers are torch's. This module decides which steps they record, and reports what they recorded; other steps cost
nothing. If a profiler or the disk fails, there is one warning, and the run continues.
"""

import contextlib
import gzip
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from blockgpt.console import echo
from blockgpt.errors import error_text
from blockgpt.training.launch import Runtime

# The steps whose communication is measured in a run of several processes: a function of the step alone, so that all
# ranks measure the same ones. Measuring costs 8 µs an event (16 ms for the 2000 events of the smallest models) and
# about 5 ms of a slower step.
FIRST_MEASURED_STEP, MEASURED_STEP_INTERVAL = 10, 500
WARMUP_STEPS = 3  # of this process, not measured: they compile, and build DDP's buckets
TABLE_ROWS = 10
# Names of events on a CPU. The time that Python takes between two operators hides no communication.
COMPUTE_PREFIXES = ("aten::", "Torch-Compiled Region", "CompiledFunction")
COMMUNICATION_PREFIXES = ("gloo:",)  # from the call to the end: queued, waiting for other ranks, sending
WAIT_PREFIXES = ("c10d::", "_c10d_functional::")  # no computation, even within a compiled region

Interval = tuple[int, int]  # (start, end) in ns
Event = tuple[str, str, int, int]  # (name, kineto's activity type, start, end)


class ProfilerLog(Protocol):
    """The part of the run's log that this module uses."""

    @property
    def dir(self) -> Path: ...

    def info(self, text: str) -> Any: ...

    def warning(self, text: str) -> Any: ...


class StepProfiler:
    """Records some steps of a run; a context manager that ends a running trace at its exit.

    Call `begin` and `end` around each step, without evaluation and checkpoints. A trace of several steps also records
    what happens between them.
    """

    def __init__(self, config: Any, runtime: Runtime, log: ProfilerLog) -> None:
        """Record nothing yet.

        Args:
            config: its key `profile` selects the steps of the trace.
            log: the trace is written to its directory.
        """
        self.runtime, self.log = runtime, log
        self.traced_steps: Sequence[int] = config.profiled_steps()
        self.trace: Any = None  # torch.profiler.profile while a trace runs
        self.profiler: Any = None  # torch.autograd.profiler.profile while a step's communication is measured
        self.measured: dict[str, float] | None = None
        self.is_measured = False  # whether `communication` has a step to report, on all ranks
        self.steps = 0  # of this process
        self.failed = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.profiler = None  # its step did not end
        if self.trace:
            self._write_trace()

    def begin(self, step: int) -> None:
        """Call before step `step`, counted from 1."""
        self.steps += 1
        if step in self.traced_steps:
            if self.trace is None and not self.failed:
                with self._warn_on_failure():
                    self.trace = self._start_trace()
        elif (self.runtime.world_size > 1 and step % MEASURED_STEP_INTERVAL == FIRST_MEASURED_STEP
              and self.steps > WARMUP_STEPS):
            self.is_measured = True  # also where the profiler has failed: the other ranks gather
            if not self.failed:
                with self._warn_on_failure():
                    self.profiler = self._start_profiler()

    def end(self, step: int) -> bool:
        """Call after the step; returns whether it was recorded, which makes it slower than others."""
        recorded = self.profiler is not None or self.trace is not None
        if self.profiler:
            with self._warn_on_failure():
                self.measured = self._stop_profiler()
            self.profiler = None
        elif self.trace and step == self.traced_steps[-1]:
            self._write_trace()
        return recorded

    def communication(self) -> list[dict[str, float] | None] | None:
        """The cost of communication, {share, exposed} of each rank, in the last measured step.

        Collective if a step was measured since the last call, so all ranks call it after the same steps.

        Returns:
            share: the fraction of the step's time with a collective under way. exposed: the fraction with a collective
            under way and no computation, that is, not hidden by computation. None for a rank that failed to measure;
            None in place of the list if no step was measured.
        """
        if not self.is_measured:
            return None
        measured, self.is_measured, self.measured = self.measured, False, None
        return self.runtime.all_gather_object(measured)

    def _start_trace(self) -> Any:
        from torch.profiler import ProfilerActivity, profile  # its import takes a second

        on_cuda = self._synchronize()
        trace = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda)
        trace.start()
        return trace

    def _start_profiler(self) -> Any:
        """The profiler without torch.profiler's imports. On a GPU it records kernels only."""
        on_cuda = self._synchronize()
        profiler = torch.autograd.profiler.profile(use_cpu=not on_cuda, use_device="cuda" if on_cuda else None)
        profiler.__enter__()
        self.started = time.perf_counter_ns()
        return profiler

    def _stop_profiler(self) -> dict[str, float]:
        self._synchronize()
        step_time = time.perf_counter_ns() - self.started
        self.profiler.__exit__(None, None, None)
        events = [(e.name(), e.activity_type(), e.start_ns(), e.end_ns())
                  for e in self.profiler.kineto_results.events()]
        total, exposed = communication_fractions(events, step_time)
        return {"share": total, "exposed": exposed}

    def _synchronize(self) -> bool:
        """Wait for the GPU; returns whether there is one."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise kineto prints to the console
        on_cuda = self.runtime.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self.runtime.device)
        return on_cuda

    def _write_trace(self) -> None:
        """Stop the trace and write it, one file for each rank; rank zero also writes the table."""
        trace, self.trace = self.trace, None
        with self._warn_on_failure():
            self._synchronize()
            trace.stop()
            folder = Path(self.log.dir) / "profile"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank-{self.runtime.rank:05d}.json.gz"
            write_trace(trace, path)
            if self.runtime.is_rank_zero:
                table = operator_table(trace.key_averages(), self.runtime.device.type == "cuda")
                (folder / "table.txt").write_text(table + "\n")
                self.log.info(f"{table}\ntrace: {path} (chrome://tracing or ui.perfetto.dev)")

    @contextlib.contextmanager
    def _warn_on_failure(self) -> Iterator[None]:
        """Turn any error inside into one warning; nothing is recorded afterwards."""
        try:
            yield
        except Exception as error:  # of the profiler, the driver, the disk
            self.trace, self.profiler, self.failed = None, None, True
            warn(self.runtime, self.log, f"profile: {error_text(error)}: the run continues without it")


# ---------------------------------------------------------------- the cost of communication


def communication_fractions(events: Sequence[Event], step_time: int) -> tuple[float, float]:
    """(share, exposed) of a step, see `StepProfiler.communication`.

    Args:
        step_time: in ns.
    """
    kernels = [event for event in events if event[1] == "kernel"]
    if kernels:
        communication = union(event[2:] for event in kernels if event[0].startswith("nccl"))
        computation = union(event[2:] for event in kernels if not event[0].startswith("nccl"))
    else:
        communication, computation, waiting = (
            union(event[2:] for event in events if event[0].startswith(prefixes))
            for prefixes in (COMMUNICATION_PREFIXES, COMPUTE_PREFIXES, WAIT_PREFIXES))
        computation = difference(computation, waiting)
    exposed = difference(communication, computation)
    total_fraction, exposed_fraction = (min(1.0, sum(end - start for start, end in intervals) / step_time)
                                        for intervals in (communication, exposed))
    return total_fraction, exposed_fraction


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as sorted intervals that do not touch."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def difference(intervals: Sequence[Interval], removed: Sequence[Interval]) -> list[Interval]:
    """What of `intervals` is in none of `removed`; both as `union` returns them."""
    remaining, i = [], 0
    for start, end in intervals:
        while i < len(removed) and removed[i][1] <= start:
            i += 1
        j = i
        while j < len(removed) and removed[j][0] < end:
            if removed[j][0] > start:
                remaining.append((start, removed[j][0]))
            start = max(start, removed[j][1])
            j += 1
        if start < end:
            remaining.append((start, end))
    return remaining


# ---------------------------------------------------------------- traces


def operator_table(averages: Iterable[Any], cuda: bool) -> str:
    """The operators with the longest time on the device, without the operators that they call.

    Args:
        averages: torch's `key_averages()`.
    """
    def self_time(row: Any) -> float:
        return row.self_device_time_total if cuda else row.self_cpu_time_total

    # A kernel's time belongs to its operator; a row for the kernel would count it twice.
    rows = [row for row in averages if row.device_type == torch.autograd.DeviceType.CPU and self_time(row) > 0]
    total = sum(map(self_time, rows)) or 1
    lines = [f"{'operator':<60} {'ms':>12} {'share':>7} {'calls':>9}"]
    for row in sorted(rows, key=self_time, reverse=True)[:TABLE_ROWS]:
        name = row.key if len(row.key) <= 60 else row.key[:59] + "…"
        lines.append(f"{name:<60} {self_time(row) / 1e3:>12,.3f} {self_time(row) / total:>7.1%} {row.count:>9,}")
    return "\n".join(lines)


def write_trace(profiler: Any, path: Path) -> None:
    """Write the profiler's Chrome trace as gzip, atomically. Raises `OSError` if the disk refuses it."""
    text, compressed = (path.with_name(f".{path.name}.{suffix}.tmp") for suffix in ("text", "gz"))
    try:
        profiler.export_chrome_trace(str(text))
        with open(text, "rb") as f:
            f.seek(max(0, text.stat().st_size - 16))
            if not f.read().rstrip().endswith(b"}"):  # kineto reports no error
                raise OSError(0, "the trace was written incompletely")
            f.seek(0)
            with gzip.open(compressed, "wb", compresslevel=6) as out:
                shutil.copyfileobj(f, out, 1 << 20)
        os.replace(compressed, path)
    finally:
        text.unlink(missing_ok=True)
        compressed.unlink(missing_ok=True)


# ---------------------------------------------------------------- memory


@contextlib.contextmanager
def memory_history(config: Any, runtime: Runtime, log: ProfilerLog) -> Iterator[None]:
    """Record the history of CUDA's allocator, if the key `memory_snapshot` is set.

    However the block ends, also out of memory, the history is written to the run directory: memory_snapshot.pickle, by
    other ranks memory_snapshot-00001.pickle. It is a pickle because the viewer (pytorch.org/memory_viz) reads nothing
    else; nothing here reads it.
    """
    if not config.memory_snapshot or runtime.device.type != "cuda":  # a note of the header says so
        yield
        return
    path = Path(log.dir) / f"memory_snapshot{'' if runtime.is_rank_zero else f'-{runtime.rank:05d}'}.pickle"
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield
    finally:
        write_memory_snapshot(path, runtime, log)


def write_memory_snapshot(path: Path, runtime: Runtime, log: ProfilerLog) -> None:
    """Write the recorded history, and stop recording. An error is a warning, so as not to hide what ended the run."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        torch.cuda.memory._dump_snapshot(str(temporary))
        torch.cuda.memory._record_memory_history(enabled=None)
        os.replace(temporary, path)
        log.info(f"memory snapshot: {path} (pytorch.org/memory_viz)")
    except Exception as error:
        warn(runtime, log, f"{path}: {error_text(error)}: no memory snapshot")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- warnings


def warn(runtime: Runtime, log: ProfilerLog, text: str) -> None:
    """A warning of any rank; the log prints those of rank zero only."""
    if runtime.is_rank_zero:
        log.warning(text)
    else:
        echo(f"warning: rank {runtime.rank}: {text}", sys.stderr)
