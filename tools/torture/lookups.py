"""Two processes for one run; checkpoints and logs that are missing or cannot be read: nothing starts over or is lost.

New damage to a run directory is an entry of CLOSED.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tools.torture.files import listing
from tools.torture.runs import Harness, LaunchResult, Trial
from tools.torture.trials import Row, run_trials

TRIALS = 20


def two_processes(harness: Harness, mode: str, rng: random.Random, i: int) -> tuple[Trial, Counter[str]]:
    """The same command twice at once: one trains to its end, the other is refused or finds the run finished."""
    trial = harness.new_trial(mode)
    other = harness.new_trial(mode, out_dir=trial.out_dir)
    if rng.random() < 0.5:  # both resume; else both start the run
        shutil.copytree(harness.reference_run_dir(mode), trial.run_dir)
        for step in trial.checkpoint_steps()[:1]:
            shutil.rmtree(trial.run_dir / f"checkpoints/step_{step:08d}")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(Trial.launch, (trial, other)))
    refused = [result for result in results if set(result.codes) != {0}]
    for result in refused:
        check_refused(trial, result, {2})
    if len(refused) > 1:
        trial.report_broken("refused", "both")
    trial.check_end(next((result for result in results if result not in refused), results[0]))
    harness.end_trial(other)
    return trial, Counter(pairs=1, refused=len(refused))


def check_refused(trial: Trial, result: LaunchResult, codes: set[int]) -> None:
    """The launch ended with one of the exit codes and one line."""
    if result.hung or not set(result.codes) <= codes:
        trial.report_broken("codes", f"{result.codes}: {result.err[-600:]}")
    if "Traceback" in result.err or len(result.lines("error: ")) != 1:
        trial.report_broken("message", result.err[-600:])


def unmounted(path: Path) -> None:
    path.symlink_to("/no/such/disk")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def absent(path: Path) -> None:
    """Leave nothing in its place."""


CLOSED: dict[str, tuple[str, Callable[[Path], None], set[int]]] = {  # name: (what, what takes its place, exit codes)
    f"{make.__name__} {name}": (name, make, codes) for name, make, codes in (
        ("checkpoints", absent, {3}), ("checkpoints", unmounted, {2}), ("checkpoints", loop, {2}),
        ("run.json", absent, {2}), ("run.json", unmounted, {2}), ("run.json", loop, {2}), ("metrics.jsonl", loop, {2}))}


def closed(harness: Harness, mode: str, name: str, rng: random.Random, i: int) -> tuple[Trial, Counter[str]]:
    """A run of which something is missing or cannot be looked up is refused and unchanged; later it can be resumed."""
    trial = harness.new_trial(mode)
    shutil.copytree(harness.reference_run_dir(mode), trial.run_dir)
    what, make, codes = CLOSED[name]
    away = trial.folder / "away"
    (trial.run_dir / what).rename(away)
    make(trial.run_dir / what)
    before = listing(trial.run_dir)
    check_refused(trial, trial.launch(), codes)
    if listing(trial.run_dir) != before:
        trial.report_broken("overwritten", sorted(set(listing(trial.run_dir)) ^ set(before)))
    if make is not absent:
        (trial.run_dir / what).unlink()
    away.rename(trial.run_dir / what)
    trial.check_end(trial.launch())
    return trial, Counter(folders=1)


def shared(harness: Harness) -> Iterator[Row]:
    for mode in harness.modes:
        yield from run_trials(harness, "shared", mode, "pairs", TRIALS, partial(two_processes, harness, mode))


def lookups(harness: Harness) -> Iterator[Row]:
    for n, name in enumerate(CLOSED):
        mode = harness.modes[n % len(harness.modes)]
        yield from run_trials(harness, "lookups", name, "folders", TRIALS / len(CLOSED),
                              partial(closed, harness, mode, name))
