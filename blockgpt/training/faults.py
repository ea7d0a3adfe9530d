"""Faults from outside: signals, a rank that dies or hangs, a loss that is not finite on one rank.

Every process has a `Watchdog`, a background thread. It sends a heartbeat to torchrun's store twice a second, and reads
those of the other ranks only when something is wrong. Decisions that all ranks must share depend only on the
`StepStatus` of each step. A decision on another value needs a column in `gather_status` and a field in `StepStatus`.
"""

import contextlib
import faulthandler
import json
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypedDict

import torch.distributed as dist

from blockgpt.errors import DataError, PeerLostError, first_line
from blockgpt.training.background import BackgroundThread
from blockgpt.training.launch import FIRST_CALL_TIMEOUT, Runtime, connect_store, exit_process, no_heartbeat

HEARTBEAT_SECONDS = 0.5  # between two heartbeats
SILENCE_SECONDS = 4 * HEARTBEAT_SECONDS  # without a heartbeat, after which a rank counts as silent
SIGNAL_GRACE_SECONDS = 10 * HEARTBEAT_SECONDS  # without progress after a signal, before the others' heartbeats are read
SIGNAL_REPEAT_SECONDS = 1.0  # a second signal within this time is the first one, forwarded by torchrun
LAUNCHER_EXIT = 1000  # in place of a signal's number: torchrun has exited
LAUNCHER_EXIT_NAME = "the exit of torchrun"


class StepStatus(NamedTuple):
    """What all ranks know after a step; the lists are by rank."""

    loss: float
    grad_norms: list[float]  # equal on all ranks unless memory or a link is faulty
    nonfinite_micro_steps: list[int]  # the first one whose loss is not finite; 0 if only the gradient is not; else -1
    stop_reason: str | None  # the signal that requests the end of the run
    save_finished: bool  # whether an asynchronous save has ended on all ranks
    step_times: list[float]
    memory_peaks: list[float]  # bytes, where measured


class Heartbeat(TypedDict):
    """What a rank writes to the store."""

    count: int
    step: int
    phase: str


class Peer(NamedTuple):
    """Where a rank was at its last heartbeat."""

    rank: int
    step: int
    phase: str


class Watchdog:
    """Watches this process and its peers. A context manager for the whole run; `training` is one for its steps.

    Within `training`, SIGINT (Ctrl-C), SIGTERM and SIGUSR1 request a stop: all ranks stop after the same step. A second
    signal ends the process at once, unless it arrives within a second: a scheduler signals torchrun and its workers,
    and torchrun forwards the signal. The exit of torchrun requests a stop too.

    A process of several ends with exit code 6 if it makes no progress for `rank_timeout` seconds (`save_timeout` in a
    save, FIRST_CALL_TIMEOUT in a phase that it enters for the first time) or if its communication breaks. It prints
    which rank was lost, at which step and in which phase, and its own stacks.

    Attributes:
        on_peer_lost: called with the message that names the lost rank, before the process exits.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, runtime: Runtime, config: Any) -> None:
        self.runtime, self.config = runtime, config
        self.on_peer_lost: Callable[[str], object] = lambda message: None
        self.step, self.phase = 0, "start"
        self.finished_phases: set[str] = set()
        self.last_progress = time.monotonic()
        self.signal_name: str | None = None
        self.signal_time = 0.0
        self.previous_handlers: dict[signal.Signals, Any] = {}
        self.single_process = runtime.world_size == 1
        self.store = None if self.single_process else connect_watchdog_store(runtime.launch_id)
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
        self.last_progress = time.monotonic()

    def gather_status(self, micro_losses: Sequence[float] = (), step_time: float = 0.0, memory_peak: float = 0.0,
                      save_finished: bool = False, grad_norm: float = 0.0) -> StepStatus:
        """The `StepStatus` of a step; collective.

        Args:
            micro_losses: the losses of this rank's micro-batches, which add up to its loss.
        """
        nonfinite = next((i for i, loss in enumerate(micro_losses) if not math.isfinite(loss)), -1)
        own_signal = 0 if self.signal_name is None else getattr(signal.Signals, self.signal_name, LAUNCHER_EXIT)
        rows = self.runtime.all_gather(
            [sum(micro_losses), grad_norm, nonfinite, own_signal, save_finished, step_time, memory_peak])
        losses, grad_norms, nonfinites, signals, saves, step_times, memory_peaks = map(list, zip(*rows, strict=True))
        if max(nonfinites) < 0:
            nonfinites = [-1 if math.isfinite(norm) else 0 for norm in grad_norms]
        signal_number = next((int(n) for n in signals if n), None)
        if signal_number is None:
            stop_reason = None
        else:
            stop_reason = (LAUNCHER_EXIT_NAME if signal_number == LAUNCHER_EXIT else
                           signal.Signals(signal_number).name)
        return StepStatus(sum(losses) / self.runtime.tp_size, grad_norms, [int(n) for n in nonfinites], stop_reason,
                          all(saves), step_times, memory_peaks)

    # ------------------------------------------------------------ the run and its steps

    def __enter__(self) -> "Watchdog":
        self.runtime.heartbeat = self.heartbeat
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        os.set_blocking(self.write_fd, False)
        self.launcher_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.thread = BackgroundThread(self._monitor, "watchdog")
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self._raise_if_peer_lost(error)
        finally:
            self.exiting.set()
            os.write(self.write_fd, b"\0")  # wakes the thread
            self.runtime.heartbeat = no_heartbeat
            assert self.thread is not None
            self.thread.join()
            os.close(self.read_fd)
            os.close(self.write_fd)
        if error is None:
            self.thread.check()

    @contextlib.contextmanager
    def training(self) -> Iterator["Watchdog"]:
        """For the steps of a run: signals request a stop, and a lost rank is named while the log is still open."""
        self.previous_handlers = {s: signal.signal(s, self._handle_signal) for s in self.SIGNALS}
        # A main thread that waits in a collective runs no Python handler; a byte in this pipe wakes the other thread.
        self.previous_wakeup_fd = signal.set_wakeup_fd(self.write_fd, warn_on_full_buffer=False)
        try:
            yield self
        except Exception as error:
            self._raise_if_peer_lost(error)
            if isinstance(error, DataError) and not self.single_process:  # other ranks read other data
                error.args = (f"rank {self.runtime.rank}: {error}",)
                error.on_all_ranks = False
            raise
        finally:
            self._restore_handlers()
            self.enter_phase("end")

    def _raise_if_peer_lost(self, error: BaseException | None) -> None:
        """Raise `PeerLostError` if an exception of the main thread comes from a broken connection."""
        if error is not None and not self.single_process and is_broken_connection(error):
            self.heartbeat()
            message = self._lost_message(self._lost_peers(), f"communication broke ({first_line(error)})")
            raise PeerLostError(message) from None

    def _restore_handlers(self) -> None:
        if self.previous_handlers:
            signal.set_wakeup_fd(self.previous_wakeup_fd)
            for s, handler in self.previous_handlers.items():
                signal.signal(s, handler)
            self.previous_handlers = {}

    def _handle_signal(self, signal_number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name, self.signal_time = signal.Signals(signal_number).name, now
        elif now - self.signal_time > SIGNAL_REPEAT_SECONDS:
            self._restore_handlers()
            signal.raise_signal(signal_number)

    # ------------------------------------------------------------ the thread

    def _monitor(self) -> None:
        """The background thread: sends heartbeats, and ends the process where its main thread cannot."""
        first_signal: float | None = None  # when it arrived
        repeated: tuple[float, int] | None = None  # when a later one arrived, and its number
        checked_peers = 0.0
        count = 0
        self._send_heartbeat(count)  # before the first wait, so that a rank lost at once is named too
        while not self.exiting.is_set():
            ready, _, _ = select.select([self.read_fd], [], [], HEARTBEAT_SECONDS)
            now = time.monotonic()
            signals = self._read_signals() if ready else []
            if signals and first_signal is None:
                first_signal = now
            elif signals and first_signal is not None and now - first_signal > SIGNAL_REPEAT_SECONDS:
                repeated = (now, signals[-1])
            if repeated and now - repeated[0] > 2 * HEARTBEAT_SECONDS:  # the main thread could not handle it
                os._exit(128 + repeated[1])
            if self.launcher_pid is not None and os.getppid() != self.launcher_pid and self.signal_name is None:
                self.signal_time, self.signal_name = now, LAUNCHER_EXIT_NAME
            if self.store is None:
                continue
            count += 1
            self._send_heartbeat(count)
            idle = now - self.last_progress
            if idle > self._timeout():
                self._exit_peer_lost(self._lost_peers(), f"no progress for {idle:.0f} s")
            elif (self.signal_name is not None and idle > SIGNAL_GRACE_SECONDS
                  and now - checked_peers > SIGNAL_GRACE_SECONDS):
                checked_peers = now
                lost = self._lost_peers()
                if lost:
                    self._exit_peer_lost(lost, f"no progress for {idle:.0f} s after {self.signal_name}")

    def _read_signals(self) -> list[int]:
        """The numbers of the signals that have arrived since the last call."""
        with contextlib.suppress(OSError):
            return [n for n in os.read(self.read_fd, 64) if n in self.SIGNALS]
        return []

    def _timeout(self) -> float:
        """Seconds without progress after which a peer must be lost."""
        if self.phase == "save":
            return self.config.save_timeout
        if self.phase in self.finished_phases:
            return self.config.rank_timeout
        return max(FIRST_CALL_TIMEOUT, self.config.rank_timeout)

    # ------------------------------------------------------------ the other ranks

    def _send_heartbeat(self, count: int) -> None:
        if self.store is None:
            return
        heartbeat: Heartbeat = {"count": count, "step": self.step, "phase": self.phase}
        try:
            self.store.set(f"heartbeat/{self.runtime.rank}", json.dumps(heartbeat))
        except RuntimeError:  # the store's process has ended
            self.store = None

    def _read_heartbeats(self) -> dict[int, Heartbeat]:
        """The last heartbeat of every other rank that has sent one."""
        heartbeats: dict[int, Heartbeat] = {}
        store = self.store  # the other thread may set it to None meanwhile
        if store is not None:
            for rank in range(self.runtime.world_size):
                key = f"heartbeat/{rank}"
                with contextlib.suppress(RuntimeError, ValueError):
                    if rank != self.runtime.rank and store.check([key]):
                        heartbeats[rank] = json.loads(store.get(key))
        return heartbeats

    def _lost_peers(self) -> list[Peer]:
        """The ranks without a heartbeat for SILENCE_SECONDS; if there are none, those that are behind this one."""
        before = self._read_heartbeats()
        deadline = time.monotonic() + SILENCE_SECONDS
        count = -1  # other than any that `_monitor` sends
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS)
            if threading.current_thread() is self.thread:
                self._send_heartbeat(count)
                count -= 1
        after = self._read_heartbeats()
        silent = [rank for rank in after if after[rank] == before.get(rank)]
        behind = [rank for rank, peer in after.items()
                  if peer["step"] <= self.step and (peer["step"], peer["phase"]) != (self.step, self.phase)]
        return [Peer(rank, after[rank]["step"], after[rank]["phase"]) for rank in silent or behind]

    def _lost_message(self, lost: list[Peer], reason: str) -> str:
        peers = "; ".join(f"rank {peer.rank}, last heartbeat at step {peer.step} in phase {peer.phase}"
                          for peer in lost[:4])
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        return (f"rank {self.runtime.rank} at step {self.step} in phase {self.phase}: {reason}: "
                + (f"lost {peers}{more}" if lost else "no rank is silent or behind (check the network)")
                + " (continue with --resume=auto)")

    def _exit_peer_lost(self, lost: list[Peer], reason: str) -> None:
        """End the process: print the error and all stacks, notify the log."""
        message = self._lost_message(lost, reason)
        print(f"error: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # stderr may not be a file
            faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(Exception):
            self.on_peer_lost(message)
        exit_process(PeerLostError.exit_code)


def connect_watchdog_store(launch_id: str | None) -> dist.Store | None:
    """The watchdog's own connection to the store: on a shared one, a call that waits would block the others.

    Without a store (another kind of rendezvous) there are no heartbeats; the timeouts still apply.
    """
    try:
        store = connect_store()
    except (RuntimeError, KeyError, ValueError):
        return None
    return dist.PrefixStore(launch_id, store) if launch_id else store


def is_broken_connection(error: BaseException) -> bool:
    """Whether an exception means that another rank has exited."""
    words = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError)
                                                 and any(word in str(error) for word in words))
