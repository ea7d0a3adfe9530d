"""Two nodes with a link between them that is cut, slow or loses packets: network namespaces, with netem of `tc`.

A new fault of the link is a line of LINK_FAULTS. Needs root; without it there is no trial.
"""

import contextlib
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tools.torture.runs import MODES, Harness, Schedule, Trial
from tools.torture.trials import Row, run_trials

DEVICE = "veth0"  # the network device of each node
TIMEOUT = 8  # rank_timeout and save_timeout
FLAGS = [f"--rank_timeout={TIMEOUT}", f"--save_timeout={TIMEOUT}", "--join_timeout=15"]
END_TIMEOUT = 150.0  # seconds for a launch whose link is cut
TRIALS = 20
NEVER_RESTORED = 10.0**6

# {name: (netem's arguments, seconds until the link is whole again: least and most)}
LINK_FAULTS: dict[str, tuple[str, float, float]] = {
    "cut": ("loss 100%", NEVER_RESTORED, NEVER_RESTORED),
    "cut for a moment": ("loss 100%", 0.5, TIMEOUT / 2),
    "slow": ("delay {delay}ms {jitter}ms rate 2mbit", NEVER_RESTORED, NEVER_RESTORED),
    "losing packets": ("loss {loss}%", NEVER_RESTORED, NEVER_RESTORED)}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def has_namespaces() -> bool:
    """Whether this process may create network namespaces, and `tc` exists."""
    if not (shutil.which("ip") and shutil.which("tc")) or os.geteuid() != 0:
        return False
    name = f"torture{os.getpid()}"
    possible = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return possible


class TwoNodes:
    """Two network namespaces with one link. A context manager."""

    def __init__(self, trial_id: int) -> None:
        self.names = [f"torture{os.getpid()}-{trial_id}-{node}" for node in (0, 1)]

    def __enter__(self) -> "TwoNodes":
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", DEVICE, "netns", self.names[0], "type", "veth", "peer", "name", DEVICE, "netns",
           self.names[1])
        for node, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.9.8.{node + 1}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
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

    def disturb(self, netem: str) -> None:
        """Apply netem's arguments to both directions of the link."""
        for name in self.names:
            subprocess.run(["tc", "-n", name, "qdisc", "replace", "dev", DEVICE, "root", "netem", *netem.split()],
                           check=True, capture_output=True)

    def restore(self) -> None:
        for name in self.names:
            subprocess.run(["tc", "-n", name, "qdisc", "delete", "dev", DEVICE, "root"], capture_output=True)


def link_fault(harness: Harness, rng: random.Random, i: int) -> tuple[Trial, Counter[str]]:
    """A fault of the link at a random time: all ranks go on, or all end with exit code 6 and a line; then a resume."""
    name = list(LINK_FAULTS)[i % len(LINK_FAULTS)]
    netem, least, most = LINK_FAULTS[name]
    netem = netem.format(delay=rng.randint(5, 100), jitter=rng.randint(1, 5), loss=rng.randint(2, 30))
    modes = [mode for mode in harness.modes if MODES[mode][0] == 2]
    trial = harness.new_trial(modes[i // len(LINK_FAULTS) % len(modes)],
                              [f"--checkpoint_async={rng.random() < 0.5}", *FLAGS])
    start = rng.uniform(0, 2 * harness.reference(trial.mode).wall)
    with TwoNodes(next(harness.trial_ids)) as nodes:
        schedule: Schedule = [(start, partial(nodes.disturb, netem)), (start + rng.uniform(least, most), nodes.restore)]
        trial.nodes = (nodes.environments(), nodes.namespaces())
        result = trial.launch(schedule=schedule, timeout=END_TIMEOUT, peer_timeout=END_TIMEOUT)
    trial.nodes = None
    newest = trial.check_checkpoints(result.newest_saved())
    lost, errors = result.codes.count(6), result.lines("error: ")
    # A rank that has left the last barrier ends with 0, although the answer to the other may be lost.
    if result.hung or not set(result.codes) <= {0, 6}:
        trial.report_broken("codes", f"{name} at {start:.1f} s ({netem}): {result.codes}: {result.err[-1500:]}")
    if len(errors) != lost or not all("rank " in line for line in errors) or "Traceback (" in result.err:
        trial.report_broken("message", f"{name} at {start:.1f} s ({netem}): {result.codes}: {result.err[-1500:]}")
    resumed = trial.launch()
    trial.check_resumed(resumed, newest)
    trial.check_end(resumed)
    return trial, Counter({"trials": 1, "ended": int(lost == 2), "went": int(lost == 0), "split": int(lost == 1),
                           name.partition(" ")[0]: 1})


def network(harness: Harness) -> Iterator[Row]:
    if has_namespaces() and any(MODES[mode][0] == 2 for mode in harness.modes):
        yield from run_trials(harness, "network", "two nodes, a bad link", "trials", TRIALS,
                              partial(link_fault, harness))
