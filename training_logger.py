"""The run directory: run.json, metrics.jsonl. What the console shows of a run: blockgpt/progress.py.

run.json says what the run is and how it ended; it is replaced as a whole. metrics.jsonl gets one JSON object a line,
flushed at once, so that a run killed at any moment leaves a readable log. A resumed run appends a `resume` record with
its step, and goes on from there: readers (`read_log`) drop what was logged before it beyond that step. Only rank zero
writes.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from blockgpt.accounting.hardware import dtype_name
from blockgpt.accounting.meter import StepMeter
from blockgpt.checkpoints.manager import Progress, Resumption
from blockgpt.checkpoints.resume import run_exists
from blockgpt.checkpoints.saver import versions
from blockgpt.console import python_command
from blockgpt.errors import UserError
from blockgpt.experiments.log_values import BrokenLogError
from blockgpt.experiments.records import first_launch, launch_environment, read_log
from blockgpt.files import FolderLock, exists, is_dir, list_dir, unreadable, write_json
from blockgpt.kernels.choose import used_kernels
from blockgpt.progress import RunConsole, print_end, print_header
from blockgpt.training import parallel
from blockgpt.training.faults import StepStatus
from blockgpt.training.launch import Runtime
from blockgpt.training.objectives import Objective
from blockgpt.training.optimizers import rate_change
from blockgpt.training.tracker import TRACKERS, Tracker, tracker_names
from configurator import Config
from model_builder import GPT

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent
MAX_RANKS_LISTED = 64  # with more processes, the log summarises their values
RESTART_SECONDS = 30.0  # that torchrun's restart waits for the lock of a process that is being killed
LOCK_SECONDS = 5.0
RUN_KEYS = ("resume", "resume_force", "eval_only")  # how a run was started, not what it is


# ---------------------------------------------------------------- the directory


def run_directory(config: Config) -> Path:
    """The directory of this run: a new one for a new run, the run's own for a resumed one.

    Raises:
        UserError: a new run would overwrite another.
    """
    if config.run_name is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{config.model.arch_preset}"
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        return next(p for p in (Path(config.out_dir) / n for n in names) if not exists(p))
    path = Path(config.out_dir) / config.run_name
    if not config.resuming and exists(path) and not (config.resume == "auto" and is_dir(path)):
        raise UserError(f"--run_name: {path} exists (--resume=auto to continue it, or another name)")
    return path


def claim_run_directory(config: Config, runtime: Runtime) -> Path:
    """`run_directory`; that of a resumed run is locked until this process ends (`RunLog.open` locks a new one).

    Raises:
        UserError: also if another process trains in it. Nothing was changed.
    """
    run_dir = run_directory(config)
    if config.resuming:
        restarted = runtime.launch_id != runtime.first_launch_id
        lock_run_directory(run_dir, wait=RESTART_SECONDS if restarted else 1.0)
    return run_dir


def lock_run_directory(run_dir: Path, wait: float = 1.0) -> None:
    """Lock a run's directory until this process ends; `UserError` if another process has locked it."""
    try:
        FolderLock(run_dir, "trains in it", wait)
    except OSError as error:
        fix = "make it writable, or start a new run with another --run_name" if exists(run_dir) else "--out_dir=…"
        raise UserError(f"{run_dir}: cannot be written: {error.strerror} ({fix})") from None


def find_restarted_run(config: Config, runtime: Runtime) -> str | None:
    """The name of the run that these processes continue because torchrun has restarted them; None if they do not.

    It is the run that an earlier launch of the same job began: a directory of another run stays refused.
    """
    def find() -> str | None:
        runs = [Path(config.out_dir, config.run_name)] if config.run_name else list_dir(config.out_dir)
        closed: OSError | None = None
        for run in reversed(runs):
            try:
                if json.loads((run / "run.json").read_bytes())["launch"] == runtime.first_launch_id:
                    return run.name
            except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
                continue
            except OSError as error:  # perhaps another user's run
                closed = error
        if closed is not None:
            raise unreadable(closed.filename, closed)
        return config.run_name if config.run_name and not run_exists(runs[0]) else None

    # Not by torchrun's own count of restarts, which differs from node to node.
    return runtime.on_rank_zero(find) if runtime.launch_id != runtime.first_launch_id else None


def run_header(config: Config, model: GPT, objective: Objective, runtime: Runtime, meter: StepMeter,
               initial_weights: dict[str, Any] | None) -> dict[str, Any]:
    """The content of run.json without status and results; initial_weights: see `CheckpointManager`."""
    inferred = model.infer_config()
    hardware = {"device": str(runtime.device), "name": runtime.name(), "world_size": runtime.world_size,
                "threads": torch.get_num_threads(), "mode": parallel.parallel_mode(config, runtime),
                "dtype": dtype_name(runtime.dtype),
                "tf32": runtime.tf32, "compile": runtime.compile, "peak_flops": meter.peak,
                "peak_source": meter.peak_source}
    return {
        "arch_name": inferred.arch_name(), "config": config.flat(), "model": inferred.flat(),
        "criterion": objective.criterion._asdict(), "initial_weights": initial_weights,
        "parameters": model.parameter_counts(), "flops_per_token": meter.flops, "data": objective.description(),
        "attention_kernels": model.attention_kernels(runtime.dtype),
        "kernels": used_kernels(model), "kernel_times": model.kernel_times,
        "val_data": objective.val_data, "hardware": hardware, "launch": runtime.first_launch_id,
        "launches": [{"step": 0, "started_at": utc_now(), **environment(), "hardware": hardware}],
    }


def environment() -> dict[str, Any]:
    """{versions, omp_num_threads, git_commit, command}: what is needed to run this again."""
    try:
        git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                             capture_output=True, text=True, timeout=10)
        commit = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {"versions": {**versions(), "platform": platform.platform()},
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"), "git_commit": commit,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}


# ---------------------------------------------------------------- the log


class RunLog:
    """The log of one run, a context manager: how the block ends is recorded as the run's status.

    Attributes:
        dir: the run directory. Not the requested one if a run that started in the same second has taken that name.
    """

    def __init__(self, run_dir: Path, header: dict[str, Any], config: Config, console: RunConsole) -> None:
        """Write nothing yet.

        Args:
            header: see `run_header`.
            console: of the run; where it is quiet, as on ranks other than zero, this log writes nothing.
        """
        self.dir, self.config, self.console, self.quiet = Path(run_dir), config, console, console.quiet
        self.header, self.record = header, dict[str, Any]()
        self.results: dict[str, Any] = {}
        self.speeds: dict[str, list[float | None]] = {"tokens_per_sec": [], "mfu": [], "step_time": []}
        self.trackers: list[Tracker] = []
        self.final_status: dict[str, Any] = {"status": "finished", "status_reason": None}
        self.changed_environment: list[tuple[str, Any, Any]] = []  # since the launch before: (what, before, now)
        self.warned_of_overflow = False
        self.lock = threading.Lock()  # held while run.json is written

    def open(self, resumption: Resumption | None = None, progress: Progress | None = None) -> str:
        """Create the directory, or take over that of a resumed run; returns its path.

        Args:
            resumption, progress: where and how a resumed run continues; None for a new run.

        Raises:
            UserError: it cannot be written.
        """
        header = self.header
        try:
            if not self.config.resuming:
                self._create_directory()
                lock_run_directory(self.dir)
                if run_exists(self.dir):
                    raise UserError(f"{self.dir}: another process has trained in it meanwhile (--resume=auto to "
                                    "continue it, or another --run_name)")
            self.metrics = open(self.dir / "metrics.jsonl", "a+b")  # noqa: SIM115 (lives as long as self)
            if resumption and progress:
                header = self._take_over(header, resumption, progress)
            self.started = time.time() - (self.results.get("wall_time") or 0)  # a resumed run's time adds up
            self.record = {"schema_version": SCHEMA_VERSION, "run_name": self.dir.name, "status": None,
                           "status_reason": None, "created_at": utc_now(), **header}
            self.record |= {"status": "running", "status_reason": None}
            self._write_record()
        except BrokenLogError as error:
            raise UserError(f"{self.dir}: cannot be resumed: {error} (--resume=never and another --run_name)") from None
        except OSError as error:
            raise UserError(f"{self.dir}: cannot be written: {error.strerror} (--out_dir=…)") from None
        if names := tracker_names(self.config.tracker):
            self.record.setdefault("wandb_id", uuid.uuid4().hex[:8])  # not chosen by wandb, which could block
            self._update_record()
            self.trackers = [TRACKERS[name](self.config, self.dir, finite(self.record), self.warning) for name in names]
            for tracker in self.trackers if resumption and not self.config.eval_only else ():
                tracker.log("resume", self.record["resumes"][-1])
        return str(self.dir)

    def _create_directory(self) -> None:
        while True:
            try:
                return self.dir.mkdir(parents=True, exist_ok=self.config.resume == "auto")
            except FileExistsError:  # another run, started in the same second, was faster
                self.dir = run_directory(self.config)

    def _take_over(self, header: dict[str, Any], resumption: Resumption, progress: Progress) -> dict[str, Any]:
        """The content of a resumed run's run.json: what stays valid of the old one, and how the run continues."""
        self._end_incomplete_line()
        for stale in list_dir(self.dir, ".run.json.*.tmp"):  # of a killed process
            stale.unlink()
        before = json.loads((self.dir / "run.json").read_bytes())
        self.results = before.get("results") or {}
        if self.config.eval_only:  # an evaluation changes neither what the run is, nor how it ended
            self.final_status = {k: before.get(k) for k in self.final_status}
            return before
        resume = {"step": progress.step, "changed": resumption.changed, "forced": list(resumption.forced),
                  "world_size": header["hardware"]["world_size"]}
        self._append("resume", resume)
        if self.results.get("step", 0) > progress.step:
            self.results = self._results_at(progress)
        if progress.skipped:
            self.results["skipped_steps"] = progress.skipped
        origin = {k: before[k] for k in ("created_at", "wandb_id") if k in before}
        start_keys = {k: v for k, v in before["config"].items() if k in RUN_KEYS}
        launches = before.get("launches") or [first_launch(before)]
        then, now = launch_environment(launches[-1]), launch_environment(header["launches"][-1])
        self.changed_environment = [(name, then[name], now[name]) for name in now
                                    if name in then and then[name] != now[name]
                                    and name not in resumption.changed]
        return {**header, **origin, "config": {**header["config"], **start_keys},
                "resumes": [*before.get("resumes", []), resume],
                "launches": [*launches, {**header["launches"][-1], "step": progress.step}]}

    def _results_at(self, progress: Progress) -> dict[str, Any]:
        """The results of a run that goes back to an earlier step: without those of the training that is abandoned."""
        records, _ = read_log(self.dir / "metrics.jsonl")
        evals, spikes = ([r for r in records if r.get("kind") == record_type] for record_type in ("eval", "spike"))
        measured = {k: v for k, v in self.results.items() if k in (*self.speeds, "peak_memory", "wall_time")}
        final = {k: v for k, v in (evals[-1] if evals else {}).items() if k not in ("kind", "val_data")}
        counts = {"spikes": len(spikes)} if spikes else {}
        best = {f"best_{name}": value for name, value in (progress.best or {}).items()}
        saved = {"saved_step": progress.step} if progress.step else {}  # where it goes back to
        return {**measured, **final, **best, **counts, **saved, "step": progress.step, "tokens": progress.tokens}

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.quiet:
            return
        if exc_type is None:
            self._end(self.final_status)
        else:
            self._end({"status": "interrupted" if issubclass(exc_type, KeyboardInterrupt) else "failed",
                       "status_reason": " ".join(f"{exc_type.__name__}: {error}".split())[:500]})
        self.console.close()
        self._update_record()
        with contextlib.suppress(OSError):  # a full disk may have ended the run
            self.metrics.close()
        for tracker in self.trackers:
            tracker.finish(finite(self.record))

    # ------------------------------------------------------------ how it begins and ends

    def begin(self, model: GPT, resumption: Resumption | None, step: int) -> None:
        """Print what is trained, where a resumed run continues (after `step` steps), and what has changed."""
        if self.quiet:
            return
        classes = {axis: option.class_name for axis, option in model.infer_config().options().items()
                   if option.label or self.header["model"][axis] != "none"}
        print_header(self.console, self.header, classes, len(self.config.phases()), str(self.dir))
        hardware = self.header["hardware"]
        for line in self.config.notes(hardware["device"].partition(":")[0], hardware["dtype"], step):
            self.info(f"note: {line}")
        weights = self.header.get("initial_weights")
        if weights and (resumption is None or resumption.path is None):
            self.info(f"weights of {weights['path']}, step {weights['step']}, sha256 {weights['sha256'][:12]}")
        if resumption is None:
            return
        self.info(f"resumed from {resumption.path} at step {step}" if resumption.path
                  else f"{self.dir}: no checkpoint yet, starting at step 0")
        if self.config.eval_only:
            return
        for name, (before, now) in resumption.changed.items():
            self.info(f"  {name}: {before} -> {now}{' (forced)' if name in resumption.forced else ''}")
        for name, before, now in self.changed_environment:
            self.info(f"  {name}: {before} -> {now}" + (" (sums in another order)" if name == "threads" else ""))
        if step < self.config.max_iters and (change := rate_change(step, self.config, resumption.changed)):
            self.info(f"note: {change}")

    def finished(self, stopped_early: str | None) -> None:
        """Record that no step is left, and why if the run has stopped before max_iters."""
        if self.quiet:
            return
        self.final_status["status_reason"] = stopped_early and f"stopped early: {stopped_early}"
        self._end(self.final_status)
        self.console.close()
        self.info(f"stopped early: {stopped_early}" if stopped_early else f"done: {self.dir}")
        more = f"--patience={2 * self.config.patience}" if stopped_early else f"--max_iters={2 * self.config.max_iters}"
        commands = [self._command("compare_architectures.py", *self._out_dir()), self._resume_command(more)]
        if self.header.get("model", {}).get("causal", True):
            commands.insert(1, self._command("sample.py", f"--run={self.dir}"))
        metric = self.header.get("criterion", {}).get("metric", "val_loss")
        print_end(self.console, self.results, metric, time.time() - self.started, commands)

    def interrupted(self, reason: str, step: int) -> None:
        """Record that `reason`, such as a signal, stopped the run after `step` steps, with its state saved."""
        if self.quiet:
            return
        self.record |= {"status": "interrupted", "status_reason": f"{reason} at step {step}"}
        self.console.close()
        self.info(f"interrupted by {reason} at step {step}, saved; to continue:\n"
                  f"  {shlex.join(self._resume_command())}")

    def _command(self, script: str, *arguments: str) -> list[str]:
        """The words of a command of the project, as it can be typed in this folder."""
        return [python_command(), os.path.join(os.path.dirname(sys.argv[0]), script), *arguments]

    def _resume_command(self, *arguments: str) -> list[str]:
        """The words of the command that continues the run, as it was started."""
        words = self._command("train.py", "--resume=must", f"--run_name={self.dir.name}", *self._out_dir(), *arguments)
        size = self.header["hardware"]["world_size"]
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        nodes = ["--standalone"] if local_size == size else [f"--nnodes={size // local_size}"]
        return words if size == 1 else ["torchrun", *nodes, f"--nproc_per_node={local_size}", *words[1:]]

    def _out_dir(self) -> list[str]:
        return [] if self.config.out_dir == "runs" else [f"--out_dir={self.config.out_dir}"]

    def ended(self, status: str, reason: str) -> None:
        """Record how the process ends, from any thread, just before it does. A status that is final stays."""
        if self.quiet or not self.record:
            return
        self._end({"status": status, "status_reason": reason})
        for _ in range(3):
            with contextlib.suppress(RuntimeError):  # the main thread changed the record meanwhile
                return self._update_record()

    def _end(self, status: dict[str, Any]) -> None:
        if self.record["status"] == "running":  # an evaluation does not change how its run has ended
            self.record |= self.final_status if self.config.eval_only else status

    # ------------------------------------------------------------ records

    def step(self, step: int, tokens: int, status: StepStatus, lr: float, speed: dict[str, float | None],
             memory: dict[str, int | None], consumed: dict[str, int], communication: list[Any] | None,
             metrics: dict[str, float] | None = None) -> None:
        """One training step.

        Args:
            step, tokens: how many are done.
            status: of the step, from all ranks.
            speed: see `StepMeter.report`.
            memory: this process's {allocated, peak, reserved}, in bytes.
            consumed: {source: tokens}.
            communication: by rank, see `profiling`; None where it was not measured.
            metrics: of the objective and of the model's components.
        """
        if self.quiet:
            return
        values: dict[str, Any] = {"step": step, "tokens": tokens, "loss": status.loss, "lr": lr,
                                  "grad_norm": status.grad_norms[0], **speed, "memory": memory,
                                  "tokens_per_source": consumed, "skipped": self.results.get("skipped_steps", 0)}
        if metrics:
            values["metrics"] = metrics
        if len(status.step_times) > 1:
            values |= rank_statistics(status.step_times, status.memory_peaks, communication)
            values["memory"] = {**memory, "peak": max(status.memory_peaks)}
        self._append("step", values)
        for name, series in self.speeds.items():
            series.append(values[name])
        self.results |= {"step": step, "tokens": tokens, "peak_memory": values["memory"].get("peak"),
                         "tokens_per_source": consumed, "wall_time": round(time.time() - self.started, 3)}
        if values.get("communication"):
            self.results["communication"] = values["communication"]
        self.console.step(values)

    def evaluation(self, step: int, tokens: int, metrics: dict[str, float], best: dict[str, Any] | None) -> None:
        """The validation metrics after `step` optimizer steps, and the {"step", metrics} of the best so far.

        With eval_only, an existing run keeps its results: the evaluation is a record of another type, which no
        comparison reads, and which says how it was made.
        """
        if self.quiet:
            return
        self.info(f"step {step:>6}   " + "   ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        values = {"step": step, "tokens": tokens, **metrics, "val_data": self.header.get("val_data")}
        if self.config.eval_only and self.config.resuming:
            self._append("eval_only", {**values, "launch": self.header["launches"][-1]})
            return
        self._append("eval", values)
        self.results |= {"step": step, "tokens": tokens, **metrics}
        if best:
            self.results |= {f"best_{name}": value for name, value in best.items()}
        self._update_record()

    def irregular(self, step: int, status: StepStatus, z_score: float | None, skipped: bool, loss_scale: float) -> None:
        """A step with a spike of the loss, or with gradients that are not finite."""
        if not status.is_finite:
            self.overflow(step, loss_scale)
        elif z_score is not None:
            self.spike(step, status.loss, z_score, skipped)

    def spike(self, step: int, loss: float, z_score: float, skipped: bool) -> None:
        """A loss `z_score` standard deviations above its running mean, and whether its update was skipped."""
        if self.quiet:
            return
        self._append("spike", {"step": step, "loss": loss, "excess": z_score, "skipped": skipped})
        self.results["spikes"] = self.results.get("spikes", 0) + 1
        self.results["skipped_steps"] = self.results.get("skipped_steps", 0) + skipped
        self.warning(f"step {step}: the loss of {loss:.4f} is a spike, {z_score:.1f} standard deviations above its "
                     f"mean{'; its update is skipped' if skipped else ''}")

    def overflow(self, step: int, loss_scale: float) -> None:
        """A step whose gradients overflowed float16, so that its update is skipped and the loss scale lowered."""
        if self.quiet:
            return
        self._append("overflow", {"step": step, "loss_scale": loss_scale})
        self.results["skipped_steps"] = self.results.get("skipped_steps", 0) + 1
        if not self.warned_of_overflow:
            self.warned_of_overflow = True
            self.warning(f"step {step}: a gradient overflows float16 at the loss scale {loss_scale:g}: the update is "
                         "skipped and the scale lowered. Such steps count as steps, and as skipped in the log; this is "
                         "said once")

    def gradients(self, step: int, layers: dict[str, dict[str, float]]) -> None:
        """Statistics per layer, of the gradients before clipping: {layer: {grad_norm, grad_max, weight_norm}}."""
        if not self.quiet:
            self._append("gradients", {"step": step, "layers": layers})

    def saved(self, step: int, seconds: float | None) -> None:
        """A checkpoint was written.

        Args:
            seconds: how long training waited for it; None for a background save.
        """
        if self.quiet:
            return
        self._append("save", {"step": step, "seconds": seconds})
        self.results["saved_step"] = step
        self._update_record()  # a resume must know that there was a checkpoint
        self.info(f"step {step:>6}   saved" + ("" if seconds is None else f" in {seconds:.2f} s"))

    # ------------------------------------------------------------ the console

    def info(self, text: str) -> None:
        """A line that stays on the console."""
        self.console.info(text)

    def warning(self, text: str) -> None:
        """A line on stderr."""
        self.console.warning(text)

    # ------------------------------------------------------------ the files

    def _append(self, record_type: str, values: dict[str, Any]) -> None:
        line = json.dumps({"kind": record_type, **finite(values)}, allow_nan=False)
        try:
            self.metrics.write(line.encode() + b"\n")
            self.metrics.flush()
        except OSError as error:
            self.warning(f"metrics.jsonl: {error.strerror}: the {record_type} line of step {values['step']} may be "
                         "lost")
        for tracker in self.trackers:
            tracker.log(record_type, finite(values))

    def _end_incomplete_line(self) -> None:
        """End an incomplete line that a killed run may have left, so that the next record is not appended to it."""
        if self.metrics.seek(0, os.SEEK_END):
            self.metrics.seek(-1, os.SEEK_END)
            if self.metrics.read(1) != b"\n":
                self.metrics.write(b"\n")

    def _write_record(self) -> None:
        for name, series in self.speeds.items():  # the first one warms up
            known = [v for v in series[len(series) > 2:] if v is not None]
            if series:
                self.results[name] = statistics.median(known) if known else None
        self.record |= {"updated_at": utc_now(), "results": self.results}
        held = self.lock.acquire(timeout=LOCK_SECONDS)  # a disk that hangs must not keep the process from ending
        try:
            write_json(self.dir / "run.json", finite(self.record))
        finally:
            if held:
                self.lock.release()

    def _update_record(self) -> None:
        try:
            self._write_record()
        except OSError as error:
            self.warning(f"run.json: {error.strerror}: it keeps its previous content")


# ---------------------------------------------------------------- what is recorded


def rank_statistics(step_times: Sequence[float], memory_peaks: Sequence[float],
                    communication: Sequence[dict[str, float] | None] | None) -> dict[str, Any]:
    """The entries of a step's record for several processes.

    Args:
        step_times: seconds, by rank.
        memory_peaks: bytes, by rank.
        communication: {share, exposed} by rank (None where the profiler failed), None if it was not measured.

    Returns:
        ranks: {name: each rank's value, or a summary (`summarize_ranks`)}; slowest_rank; and communication: the means
        of share and exposed, and waited_for, the rank with the least exposed communication. Synchronised processes all
        take the same time, so only this names the straggler that the others wait for.
    """
    by_rank: dict[str, Sequence[float | None]] = {"step_time": step_times, "memory_peak": memory_peaks}
    values: dict[str, Any] = {"slowest_rank": list(step_times).index(max(step_times))}
    known = {rank: measured for rank, measured in enumerate(communication or ()) if measured}
    if known:
        assert communication is not None
        for name in ("share", "exposed"):
            by_rank[f"communication_{name}"] = [measured[name] if measured else None for measured in communication]
        values["communication"] = {
            **{name: statistics.mean(measured[name] for measured in known.values()) for name in ("share", "exposed")},
            "waited_for": min(known, key=lambda rank: known[rank]["exposed"])}
    return {"ranks": {name: summarize_ranks(series) for name, series in by_rank.items()}, **values}


def summarize_ranks(series: Sequence[float | None]) -> Any:
    """A value of every rank as it is logged: the list, or of a long one {min, median, max, max_rank}."""
    known = [value for value in series if value is not None]
    if len(series) <= MAX_RANKS_LISTED:
        return list(series)
    if not known:
        return None
    return {"min": min(known), "median": statistics.median(known), "max": max(known),
            "max_rank": list(series).index(max(known))}


def finite(value: Any) -> Any:
    """The same JSON-able value with None for every number that JSON does not have (nan, inf)."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def utc_now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
