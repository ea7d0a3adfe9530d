"""Torture runs and checkpoints, and count broken promises. Exit code 0 if there are none.

    python -m tools.torture                       all groups: an hour on two cores
    python -m tools.torture kills --scale=0.1     one group, a tenth of its trials

Prints a line for each kind of trial, then a summary. --seed determines the trials; where the clock decides (a kill at a
random time), two runs of the tool differ. Runs are tiny, 12 steps with a save every second step. Their ranks are forked
from a process with torch loaded (ranks.py); some of each group are launched by torchrun. The run directories of broken
promises are kept, and their paths printed.

A new group is a function here, in files.py, lookups.py or network.py, that yields the rows of `run_trials`, and an
entry of GROUPS.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser
from blockgpt.errors import did_you_mean, exit_on_user_error
from blockgpt.files import user_path
from tools.torture.files import damage, malicious
from tools.torture.lookups import lookups, shared
from tools.torture.network import network
from tools.torture.ranks import PHASES
from tools.torture.runs import CHECKPOINT_INTERVAL, MODES, STEPS, Harness, Trial, read_step_times
from tools.torture.trials import Row, run_trials

DEFAULT_MODES = ("single", "ddp", "zero1", "fsdp")
KILLS = 200  # at random times
KILLS_PER_PHASE = 60
MAX_KILLS_PER_RUN = 4
TORCHRUN_INTERVAL = 10  # one trial in this many is launched by torchrun
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torchrun, to its ranks
PAUSE_TIMEOUT = 3  # seconds, of these keys
PAUSED_TIMEOUTS = ("rank_timeout", "save_timeout", "join_timeout")
SMOKE_SCALE = 0.02  # at this --scale and below, a run is killed once
Result = tuple[Trial, Counter[str]]


# ---- kills

def kill_repeatedly(harness: Harness, mode: str, phase: str | None, torchrun: bool, rng: random.Random) -> Result:
    """A run killed several times, in a phase of its saves or (None) at random times, then left to finish."""
    trial = harness.new_trial(mode, [f"--checkpoint_async={rng.random() < 0.5}"], torchrun=torchrun,
                              terminate_peers=rng.random() < 0.5)
    counts, newest = Counter(runs=1, torchrun=int(torchrun)), 0
    for _ in range(MAX_KILLS_PER_RUN if harness.scale > SMOKE_SCALE else 1):
        fault = kill = None
        if phase is None:
            ranks = rng.choice([[rank] for rank in range(trial.world_size)] + [list(range(trial.world_size))])
            wall = harness.reference(mode).wall
            kill = (rng.uniform(wall, 4 * wall) if torchrun else rng.uniform(0, wall), ranks)
        else:
            rank, count = rng.choice(harness.events(mode, phase))
            victims = ["self"] if trial.world_size == 1 else ["self", "other"] if torchrun else ["self", "other", "all"]
            # Half the events leave half the saves; the export's events are all at the end.
            n = rng.randint(1, count if phase == "export" else max(1, count // 2))
            fault = {"action": "kill", "ranks": [rank], "phase": phase, "n": n, "victim": rng.choice(victims)}
        result = trial.launch(fault, kill)
        killed = result.killed or bool(result.fired)
        counts["kills"] += killed
        counts["noticed"] += killed and 6 in result.codes
        counts["timeouts"] += result.hung  # of a rank whose peer was killed before they had connected
        trial.check_resumed(result, newest)
        newest = trial.check_checkpoints(max(newest, result.newest_saved()))
        if not killed:
            break
    result = trial.launch()
    trial.check_resumed(result, newest)
    trial.check_end(result)
    counts["launches"] = trial.launches
    return trial, counts


def kills(harness: Harness) -> Iterator[Row]:
    per_trial = 1 if harness.scale <= SMOKE_SCALE else 3
    for mode in harness.modes:
        def at_random_times(rng: random.Random, i: int, mode: str = mode) -> Result:
            return kill_repeatedly(harness, mode, None, harness.torchrun and i % TORCHRUN_INTERVAL == 0, rng)
        yield from run_trials(harness, "kills", f"{mode}, any time", "kills", KILLS / len(DEFAULT_MODES),
                              at_random_times, per_trial)
    for phase in harness.phases:
        modes = [mode for mode in harness.modes if harness.events(mode, phase)]
        for mode in modes:
            def in_phase(rng: random.Random, i: int, mode: str = mode, phase: str = phase) -> Result:
                torchrun = harness.torchrun and i == 0 and mode in ("ddp", "fsdp")
                return kill_repeatedly(harness, mode, phase, torchrun, rng)
            yield from run_trials(harness, "kills", f"{mode}, {phase}", "kills", KILLS_PER_PHASE / len(modes),
                                  in_phase, per_trial)


# ---- a full disk

@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A tmpfs at `folder`; False where mounting is not permitted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
                             capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(harness: Harness, mode: str, phase: str, rng: random.Random, i: int) -> Result:
    """The disk becomes full in a phase of a save, and has space again two steps later or after the end of the run."""
    disk = harness.folder / f"disk{next(harness.trial_ids)}"
    with small_disk(disk, 16) as mounted:
        trial = harness.new_trial(mode, [f"--checkpoint_async={rng.random() < 0.5}"], out_dir=disk)
        stays_full = rng.random() < 0.4
        rank, count = rng.choice(harness.events(mode, phase))
        fault: dict[str, Any] = {
            "ranks": [rank], "phase": phase, "n": rng.randint(1, count if phase == "export" else count // 2 or 1)}
        if mounted:
            fault |= {"action": "fill_disk", "ballast": str(disk / "ballast"), "release": 0 if stays_full else 2}
        else:
            fault |= {"action": "refuse", "failures": 10**6 if stays_full else 1}
        result = trial.launch(fault)
        failed = result.lines("warning: the checkpoint of step ")
        errors = result.lines("error: ")
        newest = trial.check_checkpoints(result.newest_saved())
        if len(failed) != len(set(failed)) or "Traceback" in result.err:
            trial.report_broken("message", result.err[-600:])
        if set(result.codes) == {4}:
            if len(errors) != 1 or "last good" not in errors[0]:
                trial.report_broken("message", result.err[-600:])
        elif set(result.codes) != {0} or result.hung:
            trial.report_broken("stopped", f"codes {result.codes}: {result.err[-600:]}")
        (disk / "ballast").unlink(missing_ok=True)
        resumed = trial.launch()
        trial.check_resumed(resumed, newest)
        trial.check_end(resumed)
        counts = Counter(trials=1, tmpfs=int(mounted), full=int(len(result.fired) > 0), failed=len(failed),
                         exit4=int(4 in result.codes))
        if trial.broken:
            shutil.copytree(disk, trial.folder / "disk")
    return trial, counts


def disk(harness: Harness) -> Iterator[Row]:
    for phase in harness.phases:
        for mode in harness.modes:
            if harness.events(mode, phase):
                yield from run_trials(harness, "disk", f"{mode}, {phase}", "trials", 4,
                                      partial(full_disk, harness, mode, phase))


# ---- signals

def send_signal(harness: Harness, signal_number: int, target: str, phase: str, mode: str, rng: random.Random) -> Result:
    """A signal in a phase of the loop: all ranks stop after the same step and save, and the run can be resumed."""
    trial = harness.new_trial(mode, [f"--checkpoint_async={rng.random() < 0.5}"], torchrun=target == "launcher")
    rank = rng.randrange(trial.world_size)
    fault: dict[str, Any] = {"action": "signal", "signal": int(signal_number), "ranks": [rank], "phase": phase,
                             "victim": {"launcher": "launcher", "one": "self", "all": "all"}[target]}
    if phase == "save":
        count = dict(harness.events(mode, "save"))[rank]
        fault["n"] = rng.randint(1, count // 2)
    else:
        fault |= {"k": rng.randint(2, 8) if phase == "step" else rng.randint(1, 2), "n": rng.randint(0, 1500)}
    result = trial.launch(fault)
    newest = trial.check_checkpoints(result.newest_saved())
    counts = Counter(signals=len(result.fired), torchrun=int(trial.torchrun))
    if result.hung:
        trial.report_broken("hung", result.err[-600:])
    elif set(result.codes) != {0}:
        trial.report_broken("codes", f"{result.codes}: {result.err[-600:]}")
    else:
        run = trial.read_run()
        if len(set(result.steps)) != 1 or len(result.steps) != trial.world_size or newest != result.steps[0]:
            trial.report_broken("steps", f"{result.steps}, newest {newest}")
        # The signal came at the last step, during a background save; or that save had fewer events than the reference.
        late = all(int(line.split()[1]) == STEPS for line in result.fired)
        # torchrun ends by a signal that it does not forward, perhaps with a core dump; its ranks look twice a second.
        late |= target == "launcher" and signal_number not in FORWARDED and run["status"] == "finished"
        counts["late"] += late
        if run["status"] != ("finished" if late else "interrupted") or not (
                late or run["status_reason"].endswith(f" at step {newest}")):
            trial.report_broken("status", f"{signal.Signals(signal_number).name}: {run['status']}: "
                                          f"{run['status_reason']}, fired in {result.fired}")
    trial.torchrun = False  # a run of torchrun is resumed without it, too
    resumed = trial.launch()
    trial.check_resumed(resumed, newest)
    trial.check_end(resumed)
    return trial, counts


def signals(harness: Harness) -> Iterator[Row]:
    signal_numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)
    modes = [mode for mode in harness.modes if MODES[mode][0] > 1] or ["single"]
    for target in ("launcher", "one", "all") if harness.torchrun else ("one", "all"):
        for phase in ("step", "evaluation", "save"):
            def in_phase(rng: random.Random, i: int, target: str = target, phase: str = phase) -> Result:
                return send_signal(harness, signal_numbers[i % 6], target, phase, modes[(i + i // 6) % len(modes)], rng)
            yield from run_trials(harness, "signals", f"{target}, in {phase}", "signals", 12, in_phase)


# ---- pauses

def pause(harness: Harness, everybody: bool, rng: random.Random, i: int) -> Result:
    """All ranks, or one of several, are stopped for longer than the time-outs, and continue.

    Together they lose nothing, not even step time. One alone counts as lost.
    """
    modes = [mode for mode in harness.modes if everybody or MODES[mode][0] > 1]
    mode = modes[i % len(modes)]
    trial = harness.new_trial(mode, [f"--checkpoint_async={rng.random() < 0.5}",
                                     *(f"--{key}={PAUSE_TIMEOUT}" for key in PAUSED_TIMEOUTS)])
    start, seconds = rng.uniform(0, harness.reference(mode).wall), rng.uniform(2, 3) * PAUSE_TIMEOUT
    rank = rng.randrange(trial.world_size)

    def send(signal_number: int) -> None:
        harness.server.signal(trial.ranks if everybody else [trial.ranks[rank]], signal_number)

    result = trial.launch(schedule=[(start, partial(send, signal.SIGSTOP)),
                                    (start + seconds, partial(send, signal.SIGCONT))], peer_timeout=60)
    newest = trial.check_checkpoints(result.newest_saved())
    lost = 6 in result.codes
    if result.hung or not set(result.codes) <= ({0} if everybody else {0, 6}):
        trial.report_broken("codes", f"paused at {start:.2f} s: {result.codes}: {result.err[-1500:]}")
    if everybody:
        times = [step_time for step_time in read_step_times(trial.run_dir) if step_time > seconds - 1]
        if times:
            trial.report_broken("step time", f"{times} of a pause of {seconds:.1f} s")
    resumed = trial.launch()
    trial.check_resumed(resumed, newest)
    trial.check_end(resumed)
    return trial, Counter(pauses=1, told=int("paused for " in result.out), lost=int(lost))


def pauses(harness: Harness) -> Iterator[Row]:
    yield from run_trials(harness, "pauses", "all ranks", "pauses", 20, partial(pause, harness, True))
    if any(MODES[mode][0] > 1 for mode in harness.modes):
        yield from run_trials(harness, "pauses", "one of several ranks", "pauses", 10, partial(pause, harness, False))


# ---- not finite

def not_finite(harness: Harness, where: str, rng: random.Random, i: int) -> Result:
    """NaN or an infinity on one rank: all ranks exit before the update, and the run resumes from its last save."""
    trial = harness.new_trial(harness.modes[i % len(harness.modes)])
    rank, step, micro_steps = rng.randrange(trial.world_size), rng.randint(1, STEPS), 4 // trial.world_size
    result = trial.launch({"action": "nonfinite", "value": rng.choice(["nan", "inf", "-inf"]), "where": where,
                           "n": step, "ranks": [rank], "micro": rng.randrange(micro_steps), "micro_steps": micro_steps})
    errors = result.lines("error: ")
    if set(result.codes) != {5} or result.hung:
        trial.report_broken("codes", f"{result.codes}: {result.err[-600:]}")
    required = [f"step {step}:", "learning rate ", "gradient norm ", "sequences ", "from token ", f"on rank {rank}:"]
    if len(errors) != 1 or not all(text in errors[0] for text in required):
        trial.report_broken("message", f"{where} on rank {rank} at step {step}: {errors}")
    last_save = (step - 1) // CHECKPOINT_INTERVAL * CHECKPOINT_INTERVAL
    newest = trial.check_checkpoints(max(last_save, result.newest_saved()))
    if newest >= step:
        trial.report_broken("saved", f"step {newest}, not finite at {step}")
    resumed = trial.launch()
    trial.check_resumed(resumed, newest)
    trial.check_end(resumed)
    return trial, Counter(trials=1)


def nonfinite(harness: Harness) -> Iterator[Row]:
    for where in ("loss", "gradient", "reduced"):
        yield from run_trials(harness, "nonfinite", f"in the {where}", "trials", 14,
                              partial(not_finite, harness, where))


# ---- ends

def run_to_end(harness: Harness, mode: str, rng: random.Random, i: int) -> Result:
    """A run of two steps: every rank and the launcher exit with code 0."""
    torchrun = harness.torchrun and i % TORCHRUN_INTERVAL == 0
    trial = harness.new_trial(mode, ["--max_iters=2"], torchrun=torchrun)
    result = trial.launch()
    if set(result.codes) != {0} or result.launcher or result.hung:
        trial.report_broken("codes", f"{result.codes}, launcher {result.launcher}: {result.err[-600:]}")
    return trial, Counter(ends=1, torchrun=int(torchrun))


def ends(harness: Harness) -> Iterator[Row]:
    for mode in [*harness.modes, "tp"] if harness.modes == DEFAULT_MODES else harness.modes:
        yield from run_trials(harness, "ends", mode, "ends", 100, partial(run_to_end, harness, mode))


# ---- the command

GROUPS: dict[str, Callable[[Harness], Iterator[Row]]] = {
    "kills": kills, "damage": damage, "disk": disk, "signals": signals, "pauses": pauses, "network": network,
    "nonfinite": nonfinite, "ends": ends, "malicious": malicious, "shared": shared, "lookups": lookups}


def run_groups(harness: Harness, groups: list[str]) -> dict[str, Row]:
    """Run the groups and print their rows; {group: the sum of its rows}."""
    totals: dict[str, Row] = {}
    for group in groups:
        for row in GROUPS[group](harness):
            print(row, flush=True)
            for promise, details in row.broken:
                print(f"  {promise}: {details}", flush=True)
            total = totals.get(group, Row(group, "in all", Counter(), [], 0.0))
            totals[group] = Row(group, "in all", total.counts + row.counts, total.broken + row.broken,
                                total.seconds + row.seconds)
    return totals


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=["all"], help=f"{', '.join(GROUPS)}, or all")
    parser.add_argument("--seed", type=int, default=1, help="seed of the trials")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the number of trials")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials at the same time")
    parser.add_argument("--folder", type=user_path, default=None,
                        help="where the trials run; default: a temporary folder")
    parser.add_argument("--modes", default=",".join(DEFAULT_MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--phases", default=",".join(PHASES), help="phases of a save, for kills and full disks")
    parser.add_argument("--no_torchrun", action="store_true", help="fork all ranks, a second per run")
    args = parser.parse_args(argv)
    modes, phases = args.modes.split(","), args.phases.split(",")
    known_names: tuple[tuple[list[str], list[str]], ...] = (
        (args.groups, [*GROUPS, "all"]), (modes, list(MODES)), (phases, list(PHASES)))
    for names, known in known_names:
        for name in names:
            if name not in known:
                parser.error(f"{name!r} is unknown{did_you_mean(name, known)}")
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=args.folder))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that small disks are unmounted
    started = time.monotonic()
    harness = Harness(folder, args.seed, args.scale, args.jobs, modes, phases, not args.no_torchrun)
    try:
        totals = run_groups(harness, [group for group in GROUPS if group in args.groups or "all" in args.groups])
    finally:
        harness.close()
    print(f"\nseed {args.seed}, scale {args.scale:g}, {time.monotonic() - started:.0f} s")
    for total in totals.values():
        print(total)
    if any(total.broken for total in totals.values()):
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(sys.argv[1:]))
