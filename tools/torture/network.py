"""Two nodes in network namespaces, with a link between them that is cut, slow or loses packets.

The link is a thread that carries packets between two TUN devices, so that no kernel module such as netem is needed. A
new fault of the link is a line of LINK_FAULTS. Needs root; without it there is no trial.
"""

import contextlib
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from blockgpt.training.background import BackgroundThread
from tools.torture.ranks import enter_network
from tools.torture.runs import MODES, Harness, Schedule, Trial
from tools.torture.trials import Row, run_trials

DEVICE = "tun0"  # the network device of each node
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # of <linux/if_tun.h>
PACKET_BYTES = 65536
TIMEOUT = 8  # rank_timeout and save_timeout
FLAGS = [f"--rank_timeout={TIMEOUT}", f"--save_timeout={TIMEOUT}", "--join_timeout=15"]
END_TIMEOUT = 150.0  # seconds for a launch whose link is bad
TRIALS = 20
FOR_EVER = 10.0**6


class Quality(NamedTuple):
    """What a link does to each packet: lose it with a probability, or carry it after a delay in seconds."""

    loss: float = 0.0
    delay: float = 0.0


class LinkFault(NamedTuple):
    """The least and the worst quality of a fault, and the least and the longest time until the link is whole again."""

    best: Quality
    worst: Quality
    shortest: float = FOR_EVER
    longest: float = FOR_EVER

    def draw(self, rng: random.Random) -> tuple[Quality, float]:
        return (Quality(*(rng.uniform(low, high) for low, high in zip(self.best, self.worst, strict=True))),
                rng.uniform(self.shortest, self.longest))


WHOLE, CUT = Quality(delay=0.002), Quality(loss=1.0)
LINK_FAULTS = {
    "cut": LinkFault(CUT, CUT), "interrupted": LinkFault(CUT, CUT, 0.5, TIMEOUT / 2),
    "slow": LinkFault(Quality(delay=0.005), Quality(delay=0.1)),
    "lossy": LinkFault(Quality(loss=0.02), Quality(loss=0.3))}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def has_namespaces() -> bool:
    """Whether this process may create network namespaces and devices."""
    if not shutil.which("ip") or os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        return False
    name = f"torture{os.getpid()}"
    possible = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return possible


class TwoNodes:
    """Two network namespaces with one link. A context manager.

    Attributes:
        quality: of the link from now on.
        carried, lost: packets so far.
    """

    def __init__(self, trial_id: int, rng: random.Random) -> None:
        self.names = [f"torture{os.getpid()}-{trial_id}-{node}" for node in (0, 1)]
        self.quality, self.random = WHOLE, random.Random(rng.random())
        self.carried = self.lost = 0
        self.ready, self.closing = threading.Event(), threading.Event()
        self.thread: BackgroundThread | None = None

    def __enter__(self) -> "TwoNodes":
        for name in self.names:
            ip("netns", "add", name)
        self.thread = BackgroundThread(self._carry, "link")
        assert self.ready.wait(10), "the devices were not made"
        for node, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.9.8.{node + 1}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
        assert self.thread is not None
        self.closing.set()
        self.thread.join()
        self.thread.check()
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)

    def environments(self) -> list[dict[str, str]]:
        """The variables of one rank on each node, as a person or srun sets them."""
        return [{"RANK": str(node), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                 "MASTER_ADDR": "10.9.8.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": DEVICE}
                for node in (0, 1)]

    def namespaces(self) -> list[Path]:
        return [Path("/var/run/netns", name) for name in self.names]

    def set_quality(self, quality: Quality) -> None:
        self.quality = quality

    def _carry(self) -> None:
        """The link: a thread, which alone enters the namespaces to open their devices."""
        ends = []
        for path in self.namespaces():
            enter_network(str(path))
            ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            fcntl.ioctl(ends[-1], TUNSETIFF, struct.pack("16sH14x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
        self.ready.set()
        under_way: list[tuple[float, int, int, bytes]] = []  # (when it arrives, packets before it, end, packet)
        while not self.closing.is_set():
            wait = min(0.1, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.1
            for end in select.select(ends, [], [], wait)[0]:
                packet, quality = os.read(end, PACKET_BYTES), self.quality
                if self.random.random() < quality.loss:
                    self.lost += 1
                    continue
                self.carried += 1
                other = ends[1 - ends.index(end)]
                heapq.heappush(under_way, (time.monotonic() + quality.delay, self.carried, other, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # the device is not up yet
                    os.write(end, packet)
        for end in ends:
            os.close(end)


def link_fault(harness: Harness, rng: random.Random, i: int) -> tuple[Trial, Counter[str]]:
    """A fault of the link at a random time: all ranks go on, or all end with exit code 6 and a line; then a resume."""
    name = list(LINK_FAULTS)[i % len(LINK_FAULTS)]
    quality, seconds = LINK_FAULTS[name].draw(rng)
    modes = [mode for mode in harness.modes if MODES[mode][0] == 2]
    trial = harness.new_trial(modes[i // len(LINK_FAULTS) % len(modes)],
                              [f"--checkpoint_async={rng.random() < 0.5}", *FLAGS])
    start = rng.uniform(0, harness.reference(trial.mode).wall)
    with TwoNodes(next(harness.trial_ids), rng) as nodes:
        schedule: Schedule = [(start, partial(nodes.set_quality, quality)),
                              (start + seconds, partial(nodes.set_quality, WHOLE))]
        trial.nodes = (nodes.environments(), nodes.namespaces())
        result = trial.launch(schedule=schedule, timeout=END_TIMEOUT, peer_timeout=END_TIMEOUT)
    trial.nodes = None
    case = f"{name} at {start:.2f} s, {quality}, {nodes.carried} packets carried, {nodes.lost} lost"
    newest = trial.check_checkpoints(result.newest_saved())
    lost, errors = result.codes.count(6), result.lines("error: ")
    # A rank that has left the last barrier ends with 0, although the answer to the other may be lost.
    if result.hung or not set(result.codes) <= {0, 6}:
        trial.report_broken("codes", f"{case}: {result.codes}: {result.err[-1500:]}")
    if len(errors) != lost or not all("rank " in line for line in errors) or "Traceback (" in result.err:
        trial.report_broken("message", f"{case}: {result.codes}: {result.err[-1500:]}")
    resumed = trial.launch()
    trial.check_resumed(resumed, newest)
    trial.check_end(resumed)
    outcome = "late" if result.wall < start else ("continued", "split", "ended")[lost]
    return trial, Counter({"trials": int(outcome != "late"), f"{name} {outcome}": 1})


def network(harness: Harness) -> Iterator[Row]:
    if has_namespaces() and any(MODES[mode][0] == 2 for mode in harness.modes):
        yield from run_trials(harness, "network", "two nodes, a bad link", "trials", TRIALS,
                              partial(link_fault, harness))
