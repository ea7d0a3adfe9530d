"""Where a step's time and memory go: traces on request, the share of communication, the allocator's history.

`Profile` watches the loop's steps, and costs nothing in those that it lets pass. The profilers are torch's; what is
ours is which steps they see, and what is said of them. A profiler or a disk that fails is a warning: the run goes on.
"""

import contextlib
import gzip
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from blockgpt.console import echo

# Which steps of a run of several processes have their communication measured: a function of the step alone, so that
# all ranks do. One costs 8 µs an event (16 ms for the smallest models' 2000) and some 5 ms of a slower step.
SAMPLE_FIRST, SAMPLE_EVERY = 10, 500
WARM = 3  # steps of this process before a sample: the first ones compile, and build DDP's buckets
TABLE_ROWS = 10
# On a CPU. Python's own time between two operators is no computation here, and so hides nothing.
COMPUTES = ("aten::", "Torch-Compiled Region", "CompiledFunction")
COMMUNICATES = ("gloo:",)  # from the call to its end: in the queue, waiting for the others, sending
WAITS = ("c10d::", "_c10d_functional::")  # may stand within a compiled region, and compute nothing


class Profile:
    """The steps of one run as the profiler sees them; a context manager, whose end ends a trace that is under way.

    The loop calls `begin` and `end` around what belongs to a step: neither evaluation nor checkpoints. A trace runs
    through, and shows these too where they fall between its steps.
    """

    def __init__(self, config, runtime, log):
        """config: `profile` says which steps are traced. log: the `RunLog`, whose directory gets the trace."""
        self.runtime, self.log, self.asked = runtime, log, config.profiled_steps()
        self.trace = self.sample = self.measured = None
        self.begun, self.due, self.working = 0, False, True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sample = None  # of a step that did not end
        if self.trace:
            self._finish()

    def begin(self, step):
        """Before step number `step`, counted from 1, begins."""
        self.begun += 1
        if step in self.asked:
            if self.trace is None and self.working:
                with self._failure_told():
                    self.trace = self._start(full=True)
        elif self.runtime.world_size > 1 and step % SAMPLE_EVERY == SAMPLE_FIRST and self.begun > WARM:
            self.due = True  # on every rank, though the profiler of one may fail
            if self.working:
                with self._failure_told():
                    self.sample = self._start(full=False)

    def end(self, step):
        """After it: whether it was watched, which slows it down, so that its time is not the run's speed."""
        watched = self.sample or self.trace
        if self.sample:
            with self._failure_told():
                self.measured = self._communication()
            self.sample = None
        elif self.trace and step == self.asked[-1]:
            self._finish()
        return watched is not None

    def communication(self):
        """[{share, exposed} of rank 0, of rank 1, …] of a step measured since the last call; None if there was none.

        share: of the step's time, how much had a collective under way. exposed: how much of it while that process
        computed nothing: communication that is not hidden behind computation. A rank that failed to measure: None.
        Where there was such a step, the ranks ask each other: all call this after the same steps.
        """
        if not self.due:
            return None
        measured, self.due, self.measured = self.measured, False, None
        return self.runtime.all_gather_object(measured)

    def _start(self, full):
        """A profiler that runs."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to the console of its own
        cuda = self._wait_for_device()
        if full:
            from torch.profiler import ProfilerActivity, profile  # a second of imports

            profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
            profiler.start()
            return profiler
        # The plain one, which imports nothing more. On a GPU the kernels tell everything.
        profiler = torch.autograd.profiler.profile(use_cpu=not cuda, use_device="cuda" if cuda else None)
        profiler.__enter__()
        self.started = time.perf_counter_ns()
        return profiler

    def _wait_for_device(self):
        cuda = self.runtime.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.runtime.device)
        return cuda

    def _communication(self):
        self._wait_for_device()
        took = time.perf_counter_ns() - self.started
        self.sample.__exit__(None, None, None)
        events = [(e.name(), e.activity_type(), e.start_ns(), e.end_ns()) for e in self.sample.kineto_results.events()]
        share, exposed = shares(events, took)
        return {"share": share, "exposed": exposed}

    def _finish(self):
        """Stop the trace and write it: each rank its own, the table by the main process."""
        trace, self.trace = self.trace, None
        with self._failure_told():
            self._wait_for_device()
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
    def _failure_told(self):
        """One warning for whatever goes wrong within; nothing is watched from there on."""
        try:
            yield
        except Exception as error:  # of the profiler, the driver, the disk
            self.trace, self.sample, self.working = None, None, False
            warn(self.runtime, self.log, f"profile: {reason(error)}: the run goes on without")


def shares(events, took):
    """(share, exposed): see `Profile.communication`. events: [(name, kineto's type, start, end)] of a step, in ns;
    took: the step's own time in ns."""
    kernels = [event for event in events if event[1] == "kernel"]
    if kernels:
        communicating = [event[2:] for event in kernels if event[0].startswith("nccl")]
        computing = merged(event[2:] for event in kernels if not event[0].startswith("nccl"))
    else:
        communicating, computing, waiting = (merged(event[2:] for event in events if event[0].startswith(names))
                                             for names in (COMMUNICATES, COMPUTES, WAITS))
        computing = without(computing, waiting)
    communicating = merged(communicating)
    exposed = without(communicating, computing)
    return tuple(min(1.0, sum(end - start for start, end in spans) / took) for spans in (communicating, exposed))


def merged(spans):
    """The union of [(start, end)] as spans in order that do not touch: what overlaps counts once."""
    union = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1][1] = max(end, union[-1][1])
        else:
            union.append([start, end])
    return union


def without(spans, others):
    """What of `spans` is in none of `others`, both as `merged` leaves them."""
    left, i = [], 0
    for start, end in spans:
        while i < len(others) and others[i][1] <= start:
            i += 1
        j = i
        while j < len(others) and others[j][0] < end:
            if others[j][0] > start:
                left.append([start, others[j][0]])
            start = max(start, others[j][1])
            j += 1
        if start < end:
            left.append([start, end])
    return left


def operator_table(averages, cuda):
    """The operators that took longest, as text: time on the device, without that of the operators that they call.

    averages: torch's `key_averages()`.
    """
    def own(row):
        return row.self_device_time_total if cuda else row.self_cpu_time_total

    # A kernel's time is its operator's; as a row of its own it would count twice.
    rows = [row for row in averages if row.device_type == torch.autograd.DeviceType.CPU and own(row) > 0]
    total = sum(map(own, rows)) or 1
    lines = [f"{'operator':<60} {'ms':>12} {'share':>7} {'calls':>9}"]
    for row in sorted(rows, key=own, reverse=True)[:TABLE_ROWS]:
        name = row.key if len(row.key) <= 60 else row.key[:59] + "…"
        lines.append(f"{name:<60} {own(row) / 1e3:>12,.3f} {own(row) / total:>7.1%} {row.count:>9,}")
    return "\n".join(lines)


def write_trace(profiler, path):
    """The profiler's Chrome trace as gzip, whole or not at all; `OSError` from a disk that refuses."""
    text, packed = (path.with_name(f".{path.name}.{kind}.tmp") for kind in ("text", "gz"))
    try:
        profiler.export_chrome_trace(str(text))
        with open(text, "rb") as f:
            f.seek(max(0, text.stat().st_size - 16))
            if not f.read().rstrip().endswith(b"}"):  # kineto does not tell
                raise OSError(0, "the disk took only a part of it")
            f.seek(0)
            with gzip.open(packed, "wb", compresslevel=6) as out:
                shutil.copyfileobj(f, out, 1 << 20)
        os.replace(packed, path)
    finally:
        text.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)


@contextlib.contextmanager
def memory_history(config, runtime, log):
    """Within it, `memory_snapshot` records CUDA's allocator; however the block ends, out of memory above all, the
    history stands in the run directory: memory_snapshot.pickle, of other ranks memory_snapshot-00001.pickle.

    A pickle, since the viewer (pytorch.org/memory_viz) reads nothing else. It is written for that and never read here.
    """
    if not config.memory_snapshot:
        yield
        return
    if runtime.device.type != "cuda":
        if runtime.is_rank_zero and "memory_snapshot" not in config.keys_without_effect():  # else the header says it
            log.warning(f"memory_snapshot has no effect here: the device is {runtime.device.type}, and only CUDA's "
                     "allocator keeps a history")
        yield
        return
    path = Path(log.dir) / f"memory_snapshot{'' if runtime.is_rank_zero else f'-{runtime.rank:05d}'}.pickle"
    temporary = path.with_name(f".{path.name}.tmp")
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield
    finally:
        try:
            torch.cuda.memory._dump_snapshot(str(temporary))
            torch.cuda.memory._record_memory_history(enabled=None)
            os.replace(temporary, path)
            log.info(f"memory snapshot: {path} (pytorch.org/memory_viz)")
        except Exception as error:  # it must not hide what ended the run
            warn(runtime, log, f"{path}: {reason(error)}: no memory snapshot")
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def warn(runtime, log, text):
    """A warning of any rank: the log speaks for the main one alone."""
    if runtime.is_rank_zero:
        log.warning(text)
    else:
        echo(f"warning: rank {runtime.rank}: {text}", sys.stderr)


def reason(error):
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
