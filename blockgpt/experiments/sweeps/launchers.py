"""Where the runs of a study are started: processes of this computer, Slurm through submitit, Ray. No torch.

A launcher starts a `Job` and returns a handle, which the runner polls. All of them start the same command, train.py in
a process of its own, and leave its state to the run directory. To add one: a class with `slots` and `start`, and a line
in `LAUNCHERS`.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blockgpt.errors import UserError, first_line, require_package
from blockgpt.files import exists

POLL_SECONDS = 0.5  # between looks for the file that stops a job
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not between fork and exec


@dataclass(frozen=True)
class Job:
    """A command to start.

    Attributes:
        command: its words.
        folder: for its console output, console.txt, and the file `stop`, which asks it to end.
        cwd: its current folder.
        environment: variables in addition to those of this process.
    """

    command: tuple[str, ...]
    folder: Path
    cwd: Path
    environment: Mapping[str, str]


class Handle(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs or waits."""

    def stop(self) -> None:
        """Ask it to save and end; a second call asks again."""


class Launcher(Protocol):
    """Starts jobs.

    slots: how many at once.
    """

    slots: int

    def start(self, job: Job) -> Handle: ...


def die_with_parent() -> None:
    """In a new process: get SIGTERM when the process that started it ends, however it ends. Linux only.

    Then the run saves and can be resumed by whoever continues the study; elsewhere it trains on to its end.
    """
    if LIBC is not None:
        LIBC.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def start_process(job: Job) -> "subprocess.Popen[bytes]":
    """Start a job on this computer, its output appended to console.txt.

    It is in a session of its own: Ctrl-C in the terminal reaches the study alone, which then stops its runs.
    """
    with open(job.folder / "console.txt", "ab") as console:
        return subprocess.Popen(job.command, cwd=job.cwd, env={**os.environ, **job.environment}, stdout=console,
                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                                preexec_fn=die_with_parent)


def run_job(job: Job) -> int:
    """Run a job to its end, within a process of a cluster; returns its exit code.

    The file `stop` in its folder ends it, which works wherever the folder can be read. An interrupt does, too.
    """
    process = start_process(job)
    try:
        while process.poll() is None:
            if exists(job.folder / "stop"):
                process.terminate()
                return process.wait()
            time.sleep(POLL_SECONDS)
        return process.returncode
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


class LocalHandle:
    """A process of this computer, in a slot of its launcher."""

    def __init__(self, process: "subprocess.Popen[bytes]", free: Callable[[], None]) -> None:
        self.process, self.free = process, free

    def poll(self) -> int | None:
        if self.process.poll() is not None:
            self.free()
        return self.process.returncode

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()


class LocalLauncher:
    """Processes of this computer: one for each GPU, or `workers` on the CPU.

    Args:
        workers: runs at once; on GPUs they take turns on them.
        gpus: what CUDA_VISIBLE_DEVICES names them; empty: the CPU.
    """

    def __init__(self, workers: int, gpus: Sequence[str] = ()) -> None:
        self.slots, self.gpus = workers, list(gpus)
        self.free = list(range(workers))

    def start(self, job: Job) -> LocalHandle:
        slot = self.free.pop(0)
        if self.gpus:
            gpu = self.gpus[slot % len(self.gpus)]
            job = Job(job.command, job.folder, job.cwd, {**job.environment, "CUDA_VISIBLE_DEVICES": gpu})
        try:
            process = start_process(job)
        except OSError as error:
            self.free.append(slot)
            raise UserError(f"{job.command[0]}: cannot be started: {error.strerror}") from None

        def free() -> None:
            if slot not in self.free:
                self.free.append(slot)

        return LocalHandle(process, free)


class SubmititHandle:
    """A job of submitit."""

    def __init__(self, job: Any, folder: Path) -> None:
        self.job, self.folder = job, folder

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except Exception as error:  # the job itself failed: it was cancelled, lost its node, or could not be started
            with open(self.folder / "console.txt", "a") as console:
                console.write(f"{type(error).__name__}: {first_line(error)}\n")
            return -signal.SIGKILL

    def stop(self) -> None:
        (self.folder / "stop").touch()
        if self.job.state in ("PENDING", "REQUEUED"):
            self.job.cancel()


class SlurmLauncher:
    """Jobs of Slurm through submitit.

    Args:
        workers: jobs in the queue at once.
        folder: for submitit's own files; on a file system that all nodes share.
        parameters: of sbatch, as `submitit.AutoExecutor.update_parameters` takes them ({"slurm_partition": "gpu",
            "timeout_min": 60, "gpus_per_node": 1}); `cluster`: "slurm", or "local" to try it on this computer.
    """

    def __init__(self, workers: int, folder: Path, parameters: Mapping[str, Any]) -> None:
        submitit = require_package("submitit")
        self.slots, options = workers, {"timeout_min": 24 * 60, **parameters}
        try:
            self.executor = submitit.AutoExecutor(folder / "submitit", cluster=options.pop("cluster", "slurm"))
            self.executor.update_parameters(**options)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            raise UserError(f"--launcher=slurm: {first_line(error)} (--slurm name=value,…)") from None

    def start(self, job: Job) -> SubmititHandle:
        return SubmititHandle(self.executor.submit(run_job, job), job.folder)


class RayHandle:
    """A task of Ray."""

    def __init__(self, ray: Any, task: Any, folder: Path) -> None:
        self.ray, self.task, self.folder = ray, task, folder

    def poll(self) -> int | None:
        done, _ = self.ray.wait([self.task], timeout=0)
        if not done:
            return None
        try:
            return int(self.ray.get(self.task))
        except self.ray.exceptions.RayError as error:
            with open(self.folder / "console.txt", "a") as console:
                console.write(f"{type(error).__name__}: {first_line(error)}\n")
            return -signal.SIGKILL

    def stop(self) -> None:
        (self.folder / "stop").touch()


class RayLauncher:
    """Tasks of Ray: of the cluster that RAY_ADDRESS names, else of a local one.

    Args:
        workers: tasks at once.
        cpus, gpus: that a task takes.
    """

    def __init__(self, workers: int, cpus: int, gpus: int) -> None:
        self.ray, self.slots = require_package("ray"), workers
        if not self.ray.is_initialized():
            local = {} if "RAY_ADDRESS" in os.environ else {"_node_ip_address": "127.0.0.1"}
            self.ray.init(log_to_driver=False, include_dashboard=False, **local)
        self.remote = self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(run_job)

    def start(self, job: Job) -> RayHandle:
        return RayHandle(self.ray, self.remote.remote(job), job.folder)


LAUNCHERS = ("local", "slurm", "ray")
