"""What may happen to a run from outside: signals, a peer that dies or hangs, this process's own standstill.

Every process has a `Watchdog`. It tells the others twice a second, through the store that torchrun keeps, where it is; it
asks about them only when something is wrong. What the processes must decide alike they decide in `agree`, once a step.
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
from typing import NamedTuple

import torch.distributed as dist

from blockgpt.errors import DataError, PeerLostError, first_line
from blockgpt.training.launch import FIRST_CALL_TIMEOUT, connect_store, exit_process

HEARTBEAT_SECONDS = 0.5  # seconds between two signs of life
SILENCE_SECONDS = 4 * HEARTBEAT_SECONDS  # how long no sign must come from a peer that is to be called silent
SIGNAL_GRACE_SECONDS = 10 * HEARTBEAT_SECONDS  # without progress after a signal, before the peers are asked about: torchrun grants 30 s in all


class StepStatus(NamedTuple):
    """What all processes know alike after a step; lists are by rank."""

    loss: float
    grad_norms: list  # alike but where memory or a link failed
    nonfinite_micro_steps: list  # number of the first micro-batch whose loss is not finite; without one 0 if the gradient is not, or -1
    stop_reason: str | None  # the signal that asks for an end
    save_finished: bool  # whether an asynchronous save has ended everywhere
    step_times: list
    memory_peaks: list  # peak bytes, where asked for


class Watchdog:
    """Over a run, a context manager; over its steps, `training`.

    There Ctrl-C, SIGTERM and SIGUSR1 are a wish to stop, honoured by all processes after the same step; another one
    ends the process at once. Within a second it is the same wish: a scheduler signals torchrun and its workers, and
    torchrun passes it on. The launcher's end is such a wish too.

    A process of several that makes no progress for rank_timeout seconds (save_timeout in a save, START_LIMIT for what
    it does for the first time), or whose communication breaks, says which rank was lost, at which step and in which
    phase, shows its stacks and leaves with exit code 6.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, runtime, config):
        self.runtime, self.config = runtime, config
        self.on_peer_lost = bool  # called with the line that says which peer was lost, before the process leaves
        self.name = None  # of the signal
        self.step, self.phase, self.known = 0, "start", set()
        self.alone = runtime.world_size == 1
        self.ended = threading.Event()
        self.progress = time.monotonic()
        self.store = None if self.alone else connect_watchdog_store(runtime.launch_id)

    # ------------------------------------------------------------ what the run says

    def enter_phase(self, phase, step=None):
        """Say what is done from here on. A phase that was once left is known: its limit is the short one."""
        self.known.add(self.phase)
        self.phase = phase
        if step is not None:
            self.step = step
        self.heartbeat()

    def heartbeat(self):
        """Say that work goes on."""
        self.progress = time.monotonic()

    def gather_status(self, micro_losses=(), step_time=0.0, memory=0.0, saved=False, grad_norm=0.0):
        """The `StepStatus` on a step: micro_losses: this process's, one a micro-batch."""
        bad = next((i for i, loss in enumerate(micro_losses) if not math.isfinite(loss)), -1)
        signal_number = 0 if self.name is None else getattr(signal.Signals, self.name, LAUNCHER_GONE)
        row = [sum(micro_losses), grad_norm, bad, signal_number, saved, step_time, memory]
        rows = self.runtime.all_gather(row)
        losses, norms, bads, signals, saves, times, peaks = zip(*rows, strict=True)
        if max(bads) < 0:
            bads = [-1 if math.isfinite(norm) else 0 for norm in norms]
        number = next((int(n) for n in signals if n), 0)
        stop = number and ("the launcher's end" if number == LAUNCHER_GONE else signal.Signals(number).name)
        return StepStatus(sum(losses) / self.runtime.tp_size, list(norms), [int(b) for b in bads], stop or None,
                         all(saves), list(times), list(peaks))

    # ------------------------------------------------------------ signals

    def __enter__(self):
        self.runtime.heartbeat = self.heartbeat
        self.previous = {}
        self.pipe = os.pipe()
        for end in self.pipe:
            os.set_blocking(end, False)
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        try:
            self._explain(error)
        finally:
            self.ended.set()
            os.write(self.pipe[1], b"\0")
            self.runtime.heartbeat = bool
            self.thread.join()
            for end in self.pipe:
                os.close(end)

    @contextlib.contextmanager
    def training(self):
        """Over the steps, inside the log: signals are wishes, and a lost peer is named before the log is closed."""
        self.previous = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        # A main thread that waits in a collective runs no Python handler; a byte in this pipe wakes the other thread.
        self.old_descriptor = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        try:
            yield self
        except Exception as error:
            self._explain(error)
            if isinstance(error, DataError) and not self.alone:  # the others did not read what this one read
                error.args = (f"rank {self.runtime.rank}: {error}",)
                error.on_all_ranks = False
            raise
        finally:
            self._restore()
            self.enter_phase("end")

    def _explain(self, error):
        """Raise `PeerLostError` if that is what an exception of the main thread comes from."""
        if error is not None and not self.alone and is_broken_connection(error):
            self.heartbeat()
            why = f"communication broke ({first_line(error)})"
            raise PeerLostError(self._line(self._silent_peers(), why)) from None

    def _restore(self):
        if self.previous:
            signal.set_wakeup_fd(self.old_descriptor)
            for s, handler in self.previous.items():
                signal.signal(s, handler)
            self.previous = {}

    def _note(self, number, frame):
        now = time.monotonic()
        if self.name is None:
            self.name, self.noted = signal.Signals(number).name, now
        elif now - self.noted > 1:
            self._restore()
            signal.raise_signal(number)

    # ------------------------------------------------------------ the thread

    def _look(self):
        first, last, asked = None, None, 0.0  # when signals came, and which
        count = 0
        while not self.ended.is_set():
            ready, _, _ = select.select([self.pipe[0]], [], [], HEARTBEAT_SECONDS)
            now = time.monotonic()
            if ready:
                with contextlib.suppress(OSError):
                    numbers = [n for n in os.read(self.pipe[0], 64) if n in self.SIGNALS]
                    if numbers and first is None:
                        first = now
                    elif numbers and now - first > 1:
                        last = (now, numbers[-1])
            if last and now - last[0] > 2 * HEARTBEAT_SECONDS:  # the main thread could not honour it
                os._exit(128 + last[1])
            if self.parent is not None and os.getppid() != self.parent and self.name is None:
                self.noted, self.name = now, "the launcher's end"
            if self.store is None:
                continue
            count += 1
            self._say({"beat": count, "step": self.step, "phase": self.phase})
            still = now - self.progress
            if still > self._limit():
                self._give_up(self._silent_peers(), f"no progress for {still:.0f} s")
            elif self.name is not None and still > SIGNAL_GRACE_SECONDS and now - asked > SIGNAL_GRACE_SECONDS:
                asked = now
                silent = self._silent_peers()
                if silent:
                    self._give_up(silent, f"no progress for {still:.0f} s after {self.name}")

    def _limit(self):
        """Seconds without progress after which a peer must be lost."""
        if self.phase == "save":
            return self.config.save_timeout
        return self.config.rank_timeout if self.phase in self.known else max(FIRST_CALL_TIMEOUT, self.config.rank_timeout)

    def _say(self, what):
        try:
            self.store.set(f"beat/{self.runtime.rank}", json.dumps(what))
        except RuntimeError:  # the store went with the launcher
            self.store = None

    def _silent_peers(self):
        """[(rank, step, phase) of the peers that gave no sign of life for a while, or stand behind this process]."""
        before = self._peers()
        until = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < until:
            time.sleep(HEARTBEAT_SECONDS)
            if threading.current_thread() is self.thread:
                self._say({"beat": time.monotonic(), "step": self.step, "phase": self.phase})
        after = self._peers()
        silent = [rank for rank in after if after[rank] == before.get(rank)]
        behind = [rank for rank, peer in after.items() if (peer["step"], peer["phase"]) != (self.step, self.phase)
                  and peer["step"] <= self.step]
        return [(rank, after[rank]["step"], after[rank]["phase"]) for rank in silent or behind]

    def _peers(self):
        peers, store = {}, self.store  # the other thread may give it up meanwhile
        if store is not None:
            for rank in range(self.runtime.world_size):
                key = f"beat/{rank}"
                with contextlib.suppress(RuntimeError, ValueError):
                    if rank != self.runtime.rank and store.check([key]):
                        peers[rank] = json.loads(store.get(key))
        return peers

    def _line(self, lost, why):
        runtime = self.runtime
        who = "; ".join(f"rank {rank}, last heard of at step {step} in phase {phase}" for rank, step, phase in lost[:4])
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        return (f"rank {runtime.rank} at step {self.step} in phase {self.phase}: {why}: "
                + (f"lost {who}{more}" if lost else "no peer is silent or behind (the network?)")
                + " (go on with --resume=auto)")

    def _give_up(self, lost, why):
        line = self._line(lost, why)
        print(f"error: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # whatever stderr is
            faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(Exception):
            self.on_peer_lost(line)
        exit_process(PeerLostError.exit_code)


LAUNCHER_GONE = 1000  # in the place of a signal's number


def connect_watchdog_store(launch):
    """The store of the rendezvous, by a connection of the watch's own: one that waits would hold up the run's."""
    try:
        store = connect_store()
    except (RuntimeError, KeyError, ValueError):  # another kind of rendezvous: no signs of life, the limits stay
        return None
    return dist.PrefixStore(launch, store) if launch else store


def is_broken_connection(error):
    """Whether an exception of the main thread means that a peer is gone."""
    words = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError)
                                                 and any(word in str(error) for word in words))
