"""Repeat a kind of trial until enough events are counted, several at once."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tools.torture.runs import Harness, Trial

RunTrial = Callable[[random.Random, int], tuple[Trial, Counter[str]]]  # (random numbers, index of the trial)


class Row(NamedTuple):
    """A line of the report."""

    group: str
    name: str
    counts: Counter[str]
    broken: list[tuple[str, str]]  # (promise, details)
    seconds: float

    def __str__(self) -> str:
        columns = [f"{n} {event}" for event, n in self.counts.items()]
        columns += [f"BROKEN: {n} {promise}" for promise, n in Counter(promise for promise, _ in self.broken).items()
                    ] or ["0 broken"]
        return f"{self.group:<10}{self.name:<30} {', '.join(columns):<80} {self.seconds:5.0f} s"


def run_trials(harness: Harness, group: str, name: str, event: str, target: float, run_trial: RunTrial,
               per_trial: int = 1) -> Iterator[Row]:
    """Run trials until `target` (times --scale) of `event` are counted; yields one row.

    Args:
        run_trial: does one trial; returns it and what it counted.
        per_trial: events that one trial is expected to count, before any has run.
    """
    goal, started = max(1, round(target * harness.scale)), time.monotonic()
    counts: Counter[str] = Counter()
    broken: list[tuple[str, str]] = []
    done = 0

    def run(i: int) -> tuple[list[tuple[str, str]], Counter[str]]:
        trial, trial_counts = run_trial(random.Random(f"{harness.seed} {group} {name} {i}"), i)
        harness.end_trial(trial)
        return trial.broken, trial_counts

    with ThreadPoolExecutor(harness.jobs) as pool:
        while counts[event] < goal and done < 20 * goal:
            rate = max(counts[event] / done, 1) if done else per_trial  # events per trial so far
            batch = range(done, done + max(1, round((goal - counts[event]) / rate)))
            for trial_broken, trial_counts in pool.map(run, batch):
                broken += trial_broken
                counts += trial_counts
            done = batch.stop
    yield Row(group, name, counts, broken, time.monotonic() - started)
