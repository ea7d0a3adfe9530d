"""Heartbeats: each rank says where it is in the launch's store, twice a second, and reads the others' in an emergency.

A call to a store behind a broken link can block for ever. So every call is made in a thread that nobody waits for
longer than ANSWER_SECONDS.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch.distributed as dist

from blockgpt.training.background import BackgroundThread
from blockgpt.training.launch import Runtime
from blockgpt.training.rendezvous import connect_store

HEARTBEAT_SECONDS = 0.5  # between two heartbeats
SILENCE_SECONDS = 4 * HEARTBEAT_SECONDS  # without a heartbeat, after which a rank counts as silent
ANSWER_SECONDS = 5.0  # in which a store answers


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


class Heartbeats:
    """The heartbeats of one rank, and those of the others.

    Args:
        position: the (step, phase) of this rank.
    """

    def __init__(self, runtime: Runtime, position: Callable[[], tuple[int, str]]) -> None:
        self.runtime, self.position = runtime, position
        self.stopped = threading.Event()
        # Its own connection: on a shared one, a call that waits would block the others. Without a store (another kind
        # of rendezvous) there are no heartbeats; the timeouts still apply.
        self.store: dist.Store | None = None
        with contextlib.suppress(RuntimeError, KeyError, ValueError):
            store = connect_store()
            self.store = dist.PrefixStore(runtime.launch_id, store) if runtime.launch_id else store
        self.thread: BackgroundThread | None = None

    def start(self) -> None:
        self.thread = BackgroundThread(self._send, "heartbeats")

    def stop(self) -> None:
        assert self.thread is not None
        self.stopped.set()
        self.thread.join(ANSWER_SECONDS)

    def check(self) -> None:
        """Raise the error that ended the heartbeats, if one did."""
        assert self.thread is not None
        self.thread.check()

    def _send(self) -> None:
        count = 0
        while self.store is not None:
            step, phase = self.position()
            heartbeat: Heartbeat = {"count": count, "step": step, "phase": phase}
            try:
                self.store.set(f"heartbeat/{self.runtime.rank}", json.dumps(heartbeat))
            except RuntimeError:  # the store's process has ended
                self.store = None
            count += 1
            if self.stopped.wait(HEARTBEAT_SECONDS):
                break

    def lost_peers(self, silence: float = SILENCE_SECONDS, or_behind: bool = True) -> list[Peer] | None:
        """The ranks without a heartbeat for `silence` seconds; None if the store does not answer.

        Args:
            or_behind: if there are none, the ranks that are behind this one.
        """
        found: list[list[Peer]] = []
        thread = BackgroundThread(lambda: found.append(self._find_lost(silence, or_behind)), "lost peers")
        deadline = self.runtime.clock.time() + silence + ANSWER_SECONDS
        while thread.is_alive() and self.runtime.clock.time() < deadline:
            thread.join(HEARTBEAT_SECONDS)
        return found[0] if found else None  # an error in the thread is no answer either

    def _find_lost(self, silence: float, or_behind: bool) -> list[Peer]:
        before = self._read()
        time.sleep(silence)
        after = self._read()
        step, phase = self.position()
        lost = [rank for rank in after if after[rank] == before.get(rank)]
        if not lost and or_behind:
            lost = [rank for rank, peer in after.items()
                    if peer["step"] <= step and (peer["step"], peer["phase"]) != (step, phase)]
        return [Peer(rank, after[rank]["step"], after[rank]["phase"]) for rank in lost]

    def _read(self) -> dict[int, Heartbeat]:
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
