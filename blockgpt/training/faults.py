"""Faults from outside: signals, a rank that dies or hangs, a loss that is not finite on one rank.

Every process has a `Watchdog`, a background thread. It never waits for another process: signals.py has its signals,
heartbeats.py what it hears of other ranks. Decisions that all ranks must share depend only on the `StepStatus` of each
step. A decision on another value needs a column in `gather_status` and a field in `StepStatus`.
"""

import contextlib
import faulthandler
import math
import os
import select
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

from blockgpt.console import echo, resume_flags
from blockgpt.errors import DataError, PeerLostError, first_line, report_error
from blockgpt.training.background import BackgroundThread
from blockgpt.training.heartbeats import HEARTBEAT_SECONDS, Heartbeats, Peer
from blockgpt.training.launch import FIRST_CALL_TIMEOUT, Runtime, exit_process, no_heartbeat
from blockgpt.training.signals import REPEATED_BY_ITSELF, SignalPipe, signal_name

SIGNAL_GRACE_SECONDS = 10 * HEARTBEAT_SECONDS  # without progress after a signal, before the others' heartbeats are read
LONG_SILENCE_SECONDS = 20 * HEARTBEAT_SECONDS  # of a rank that is lost although this one would wait longer
SIGNAL_REPEAT_SECONDS = 1.0  # a second signal within this time is the first one, forwarded by torchrun
LAUNCHER_EXIT = 1000  # in place of a signal's number: torchrun has exited
LAUNCHER_EXIT_NAME = "the exit of torchrun"


class WatchedLog(Protocol):
    """What a `Watchdog` needs of the run's log; called from its thread."""

    @property
    def dir(self) -> Path: ...
    def info(self, text: str) -> None: ...
    def ended(self, status: str, reason: str) -> None: ...


class StepStatus(NamedTuple):
    """What all ranks know after a step; the lists are by rank."""

    loss: float
    grad_norms: list[float]  # equal on all ranks unless memory or a link is faulty
    nonfinite_micro_steps: list[int]  # the first one whose loss is not finite; 0 if only the gradient is not; else -1
    stop_reason: str | None  # the signal that requests the end of the run
    save_finished: bool  # whether an asynchronous save has ended on all ranks
    step_times: list[float]
    memory_peaks: list[float]  # bytes, where measured

    @property
    def is_finite(self) -> bool:
        """Whether the loss and all gradients are."""
        return math.isfinite(sum(self.grad_norms) + self.loss)


class Watchdog:
    """Watches this process and its peers. A context manager for the whole run; `training` is one for its steps.

    From `training` on, a signal requests a stop: all ranks stop after the same step. A second signal ends the process
    at once, unless it arrives within a second (a scheduler signals torchrun and its workers, and torchrun forwards the
    signal) or comes again by itself. Before `training` the first one does so. The exit of torchrun requests a stop too.

    A process of several ends with exit code 6 if it makes no progress for `rank_timeout` seconds (`save_timeout` in a
    save, FIRST_CALL_TIMEOUT in a phase that it enters for the first time) or if its communication breaks. It prints
    which rank was lost, at which step and in which phase, and its own stacks. Time in which the whole process was
    stopped does not count.

    Attributes:
        log: the run's log, which learns how the process ends; None before it is open.
    """

    def __init__(self, runtime: Runtime, config: Any) -> None:
        self.runtime, self.config = runtime, config
        self.log: WatchedLog | None = None
        self.step, self.phase = 0, "start"
        self.finished_phases: set[str] = set()
        self.clock = runtime.clock
        self.last_progress = self.clock.time()
        self.stop_requested: int | None = None  # the number of the signal, or LAUNCHER_EXIT
        self.stop_time = 0.0
        self.checked_peers = 0.0
        self.told_pause = self.clock.paused
        self.stoppable = False
        self.single_process = runtime.world_size == 1
        self.heartbeats = None if self.single_process else Heartbeats(runtime, lambda: (self.step, self.phase))
        self.exiting = threading.Event()
        self.thread: BackgroundThread | None = None

    # ------------------------------------------------------------ progress

    def enter_phase(self, phase: str, step: int | None = None) -> None:
        """Record what the process does from now on. The first time, a phase has the longer FIRST_CALL_TIMEOUT."""
        if self.thread is not None:
            self.thread.check()
        self.finished_phases.add(self.phase)
        self.phase = phase
        if step is not None:
            self.step = step
        self.heartbeat()

    def heartbeat(self) -> None:
        """Record that the phase makes progress."""
        self.last_progress = self.clock.time()

    def gather_status(self, micro_losses: Sequence[float] = (), step_time: float = 0.0, memory_peak: float = 0.0,
                      save_finished: bool = False, grad_norm: float = 0.0) -> StepStatus:
        """The `StepStatus` of a step; collective.

        Args:
            micro_losses: the losses of this rank's micro-batches, which add up to its loss.
        """
        nonfinite = next((i for i, loss in enumerate(micro_losses) if not math.isfinite(loss)), -1)
        rows = self.runtime.all_gather(
            [sum(micro_losses), grad_norm, nonfinite, self.stop_requested or 0, save_finished, step_time, memory_peak])
        losses, grad_norms, nonfinites, signals, saves, step_times, memory_peaks = map(list, zip(*rows, strict=True))
        if max(nonfinites) < 0:
            nonfinites = [-1 if math.isfinite(norm) else 0 for norm in grad_norms]
        stop = next((int(n) for n in signals if n), None)
        stop_reason = None if stop is None else reason_of(stop)
        return StepStatus(sum(losses) / self.runtime.tp_size, grad_norms, [int(n) for n in nonfinites], stop_reason,
                          all(saves), step_times, memory_peaks)

    # ------------------------------------------------------------ the run and its steps

    def __enter__(self) -> "Watchdog":
        self.runtime.heartbeat = self.heartbeat
        self.signals = SignalPipe().__enter__()
        self.launcher_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        if self.heartbeats is not None:
            self.heartbeats.start()
        self.thread = BackgroundThread(self._monitor, "watchdog")
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self._raise_if_peer_lost(error)
        finally:
            self.exiting.set()
            self.signals.wake()
            self.runtime.heartbeat = no_heartbeat
            assert self.thread is not None
            self.thread.join()
            if self.heartbeats is not None:
                self.heartbeats.stop()
            self.signals.__exit__()
        if error is None:
            self.thread.check()
            if self.heartbeats is not None:
                self.heartbeats.check()

    @contextlib.contextmanager
    def training(self) -> Iterator["Watchdog"]:
        """For the steps of a run: signals request a stop, and a lost rank is named while the log is still open."""
        self.stoppable = True
        try:
            yield self
        except Exception as error:
            self._raise_if_peer_lost(error)
            if isinstance(error, DataError) and not self.single_process:  # other ranks read other data
                error.args = (f"rank {self.runtime.rank}: {error}",)
                error.on_all_ranks = False
            self.heartbeat()
            raise
        self.enter_phase("end")

    def _raise_if_peer_lost(self, error: BaseException | None) -> None:
        """Raise `PeerLostError` if an exception of the main thread comes from a broken connection."""
        if error is not None and self.heartbeats is not None and is_broken_connection(error):
            self.heartbeat()
            message = self._lost_message(self.heartbeats.lost_peers(), f"communication broke ({first_line(error)})")
            raise PeerLostError(message) from None

    # ------------------------------------------------------------ the thread

    def _monitor(self) -> None:
        """The background thread: reads signals, and ends the process where its main thread cannot."""
        while not self.exiting.is_set():
            select.select([self.signals.read_fd], [], [], HEARTBEAT_SECONDS)
            now = self.clock.time()
            self._tell_pause()
            for signum in self.signals.read():
                self._on_signal(signum, now)
            if self.launcher_pid is not None and os.getppid() != self.launcher_pid and self.stop_requested is None:
                self.stop_requested, self.stop_time = LAUNCHER_EXIT, now
            if self.heartbeats is not None:
                self._check_progress(self.heartbeats, now)

    def _on_signal(self, signum: int, now: float) -> None:
        """The first signal of a run that trains requests a stop, any other one ends the process."""
        if self.stoppable and self.stop_requested is None:
            self.stop_requested, self.stop_time = signum, now
            self._tell(f"{signal_name(signum)}: stopping after this step and saving; again to leave now")
        elif not self.stoppable or (now - self.stop_time > SIGNAL_REPEAT_SECONDS
                                      and signum not in REPEATED_BY_ITSELF):
            reason = f"{signal_name(signum)} at step {self.step} in phase {self.phase}"
            try:
                if self.log is not None:
                    self.log.ended("interrupted", f"{reason}, not saved")
                if self.runtime.is_rank_zero:
                    echo(f"interrupted by {reason}, not saved", sys.stderr)
            finally:
                os._exit(128 + signum)

    def _tell(self, text: str) -> None:
        if self.log is not None:
            with contextlib.suppress(BrokenPipeError):  # the main thread reports it
                self.log.info(text)

    def _tell_pause(self) -> None:
        seconds, self.told_pause = self.clock.paused - self.told_pause, self.clock.paused
        if seconds:
            self._tell(f"paused for {seconds:.0f} s, which do not count as step time")

    def _check_progress(self, heartbeats: Heartbeats, now: float) -> None:
        """End the process if it has made no progress for too long."""
        idle = now - self.last_progress
        if idle > self._timeout():
            return self._exit_peer_lost(heartbeats.lost_peers(), f"no progress for {idle:.0f} s")
        # Before that: a rank that is slow, such as one that compiles, sends heartbeats; a lost one does not.
        interval = SIGNAL_GRACE_SECONDS if self.stop_requested else self.config.rank_timeout
        if idle > interval and now - self.checked_peers > interval:
            self.checked_peers = now
            lost = heartbeats.lost_peers(LONG_SILENCE_SECONDS, or_behind=False)
            if lost or lost is None:  # None: nor does the store answer
                self._exit_peer_lost(lost, f"no progress for {idle:.0f} s"
                                     + (f" after {reason_of(self.stop_requested)}" if self.stop_requested else ""))

    def _timeout(self) -> float:
        """Seconds without progress after which a peer must be lost."""
        if self.phase == "save":
            return self.config.save_timeout
        if self.phase in self.finished_phases:
            return self.config.rank_timeout
        return max(FIRST_CALL_TIMEOUT, self.config.rank_timeout)

    def _lost_message(self, lost: list[Peer] | None, reason: str) -> str:
        if lost is None:
            found = f"no answer from the store at {os.environ.get('MASTER_ADDR')} (check the network)"
        elif lost:
            found = "lost " + "; ".join(f"rank {peer.rank}, last heartbeat at step {peer.step} in phase {peer.phase}"
                                        for peer in lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        else:
            found = "no rank is silent or behind (check the network)"
        advice = "" if self.log is None else f" (to continue: {resume_flags(self.log.dir, 'auto')})"
        return f"rank {self.runtime.rank} at step {self.step} in phase {self.phase}: {reason}: {found}{advice}"

    def _exit_peer_lost(self, lost: list[Peer] | None, reason: str) -> None:
        """End the process: print the error and all stacks, notify the log."""
        error = PeerLostError(self._lost_message(lost, reason))
        report_error(error)
        with contextlib.suppress(Exception):  # stderr may not be a file
            faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(Exception):
            if self.log is not None:
                self.log.ended("failed", str(error))
        exit_process(error.exit_code)


def reason_of(stop: int) -> str:
    """A `stop_requested` in words."""
    return LAUNCHER_EXIT_NAME if stop == LAUNCHER_EXIT else signal_name(stop)


def is_broken_connection(error: BaseException) -> bool:
    """Whether an exception means that another rank has exited."""
    words = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError)
                                                 and any(word in str(error) for word in words))
