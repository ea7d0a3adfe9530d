"""Torture runs and checkpoints, and count what breaks. Exit code 0 if every promise held.

    python -m tools.torture                       all of it: an hour on two cores
    python -m tools.torture kills --scale=0.1     one group, a tenth of its trials

A line for each kind of trial, then a summary. The trials are drawn from --seed; where the clock decides (a kill at a
random moment), two runs of the tool differ. Runs are tiny, 12 steps with a save every second; ranks are forked from a
process that has torch loaded (tools/torture/ranks.py), a part of each group goes through torchrun. Run directories of
broken promises are kept and named.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blockgpt.console import ArgumentParser
from blockgpt.errors import did_you_mean, exit_on_user_error
from tools.torture.files import damage, malicious
from tools.torture.ranks import PHASES
from tools.torture.runs import EVERY, MODES, STEPS, Tool

SAVED = ("single", "ddp", "zero1", "fsdp")
KILLS = 200  # at random moments
KILLS_A_PHASE = 60
CHAIN = 4  # kills of one run at the most
TORCHRUN = 10  # one run of this many goes through torchrun


def events(tool, mode, phase):
    """[(rank, number of events of `phase` in a whole run)] of the ranks that have such."""
    counts = [dict(count, save=sum(count.values())) for count in tool.reference(mode).counts]
    return [(rank, count[phase]) for rank, count in enumerate(counts) if count.get(phase)]


# ---- kills

def kill_chain(tool, rng, mode, phase, torchrun):
    """A run killed again and again, in a phase of its saves or (None) at random moments, then left to its end."""
    trial = tool.trial(mode, [f"--checkpoint_async={rng.random() < 0.5}"], torchrun=torchrun, mimic=rng.random() < 0.5)
    figures, newest = Counter(chains=1, torchrun=int(torchrun)), 0
    for _ in range(CHAIN if tool.scale > 0.02 else 1):
        fault = kill = None
        if phase is None:
            ranks = rng.choice([[rank] for rank in range(trial.size)] + [list(range(trial.size))])
            wall = tool.reference(mode).wall
            kill = (rng.uniform(wall, 4 * wall) if torchrun else rng.uniform(0, wall), ranks)
        else:
            rank, count = rng.choice(events(tool, mode, phase))
            victims = ["self"] if trial.size == 1 else ["self", "other"] if torchrun else ["self", "other", "all"]
            # A save has a sixth of them, but for those that are only at the end.
            n = rng.randint(1, count if phase == "export" else max(1, count // 2))
            fault = {"kind": "kill", "ranks": [rank], "phase": phase, "n": n, "victim": rng.choice(victims)}
        result = trial.launch(fault, kill)
        struck = result.struck or bool(result.fired)
        figures["kills"] += struck
        figures["noticed"] += struck and 6 in result.codes
        figures["ended"] += result.hung  # a rank that waited for one killed before they had met
        trial.check_resumed(result, newest)
        newest = trial.check_visible(max(newest, result.announced()))
        if not struck:
            break
    result = trial.launch()
    trial.check_resumed(result, newest)
    trial.check_end(result)
    figures["launches"] = trial.launches
    return trial, figures


def kills(tool):
    for mode in tool.modes:
        yield from until(tool, "kills", f"{mode}, any moment", "kills", KILLS / len(SAVED), lambda rng, i, mode=mode:
                         kill_chain(tool, rng, mode, None, tool.torchrun and i % TORCHRUN == 0))
    for phase in tool.phases:
        modes = [mode for mode in tool.modes if events(tool, mode, phase)]
        for mode in modes:
            yield from until(tool, "kills", f"{mode}, {phase}", "kills", KILLS_A_PHASE / len(modes),
                             lambda rng, i, mode=mode, phase=phase: kill_chain(
                                 tool, rng, mode, phase, tool.torchrun and i == 0 and mode in ("ddp", "fsdp")))


# ---- a full disk

@contextlib.contextmanager
def small_disk(folder, megabytes):
    """A tmpfs at `folder`; False where mounting is not permitted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
                             capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(tool, rng, mode, phase):
    """The disk fills up in a phase of a save, and has room again two steps later, or not before the run has ended."""
    disk = tool.folder / f"disk{next(tool.number)}"
    with small_disk(disk, 16) as mounted:
        trial = tool.trial(mode, [f"--checkpoint_async={rng.random() < 0.5}"], out_dir=disk)
        stays = rng.random() < 0.4
        rank, count = rng.choice(events(tool, mode, phase))
        fault = {"ranks": [rank], "phase": phase, "n": rng.randint(1, count if phase == "export" else count // 2 or 1)}
        if mounted:
            fault |= {"kind": "fill", "ballast": str(disk / "ballast"), "release": 0 if stays else 2}
        else:
            fault |= {"kind": "full", "failures": 10**6 if stays else 1}
        result = trial.launch(fault)
        failed = result.lines("warning: the checkpoint of step ")
        last = result.lines("error: ")
        newest = trial.check_visible(result.announced())
        if len(failed) != len(set(failed)) or "Traceback" in result.err:
            trial.break_("told", result.err[-600:])
        if set(result.codes) == {4}:
            if len(last) != 1 or "the last good one stands" not in last[0]:
                trial.break_("told", result.err[-600:])
        elif set(result.codes) != {0} or result.hung:
            trial.break_("stopped", f"codes {result.codes}: {result.err[-600:]}")
        (disk / "ballast").unlink(missing_ok=True)
        again = trial.launch()
        trial.check_resumed(again, newest)
        trial.check_end(again)
        figures = Counter(trials=1, tmpfs=int(mounted), full=len(result.fired) > 0, failed=len(failed),
                          exit4=4 in result.codes)
        if trial.broken:
            shutil.copytree(disk, trial.folder / "disk")
    return trial, figures


def disk(tool):
    for phase in tool.phases:
        for mode in tool.modes:
            if events(tool, mode, phase):
                yield from until(tool, "disk", f"{mode}, {phase}", "trials", 4,
                                 lambda rng, i, mode=mode, phase=phase: full_disk(tool, rng, mode, phase))


# ---- signals

def signalled(tool, rng, number, target, phase, mode):
    """A signal in the midst of something: all ranks stop after the same step, save, and the run goes on later."""
    trial = tool.trial(mode, [f"--checkpoint_async={rng.random() < 0.5}"], torchrun=target == "launcher")
    rank = rng.randrange(trial.size)
    fault = {"kind": "signal", "number": int(number), "ranks": [rank], "phase": phase,
             "victim": {"launcher": "launcher", "one": "self", "all": "all"}[target]}
    if phase == "save":
        count = dict(events(tool, mode, "save"))[rank]
        fault["n"] = rng.randint(1, count // 2)
    else:
        fault |= {"k": rng.randint(2, 8) if phase == "step" else rng.randint(1, 2), "n": rng.randint(0, 1500)}
    result = trial.launch(fault)
    newest = trial.check_visible(result.announced())
    figures = Counter(signals=len(result.fired), torchrun=int(trial.torchrun))
    if result.hung:
        trial.break_("hung", result.err[-600:])
    elif set(result.codes) != {0}:
        trial.break_("codes", f"{result.codes}: {result.err[-600:]}")
    else:
        run = trial.read_run()
        if len(set(result.steps)) != 1 or len(result.steps) != trial.size or newest != result.steps[0]:
            trial.break_("steps", f"{result.steps}, newest {newest}")
        # Struck beside a save in the background, at the last step; or that save was a shorter one than was drawn.
        late = all(int(line.split()[1]) == STEPS for line in result.fired)
        figures["late"] += late
        if run["status"] != ("finished" if late else "interrupted") or not (
                late or run["status_reason"].endswith(f" at step {newest}")):
            trial.break_("status", f"{run['status']}: {run['status_reason']}, struck in {result.fired}")
    trial.torchrun = False  # across the two, a run goes on as well
    again = trial.launch()
    trial.check_resumed(again, newest)
    trial.check_end(again)
    return trial, figures


def signals(tool):
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    modes = [mode for mode in tool.modes if MODES[mode][0] > 1] or ["single"]
    for target in ("launcher", "one", "all") if tool.torchrun else ("one", "all"):
        for phase in ("step", "evaluation", "save"):
            yield from until(tool, "signals", f"{target}, in {phase}", "signals", 7,
                             lambda rng, i, target=target, phase=phase: signalled(
                                 tool, rng, kinds[i % 3], target, phase, modes[(i + i // 3) % len(modes)]))


# ---- not finite

def not_finite(tool, rng, mode, where):
    """NaN or an infinity on one rank: all end before the update, and the run goes on from its last save later."""
    trial = tool.trial(mode)
    rank, step = rng.randrange(trial.size), rng.randint(1, STEPS)
    result = trial.launch({"kind": "nonfinite", "value": rng.choice(["nan", "inf", "-inf"]), "where": where, "n": step,
                           "ranks": [rank], "micro": rng.randrange(4 // trial.size), "micro_steps": 4 // trial.size})
    errors = result.lines("error: ")
    if set(result.codes) != {5} or result.hung:
        trial.break_("codes", f"{result.codes}: {result.err[-600:]}")
    asked = [f"step {step}:", "learning rate ", "gradient norm ", "sequences ", "from token ", f"on rank {rank}:"]
    if len(errors) != 1 or not all(word in errors[0] for word in asked):
        trial.break_("told", f"{where} on rank {rank} at step {step}: {errors}")
    newest = trial.check_visible(max((step - 1) // EVERY * EVERY, result.announced()))
    if newest >= step:
        trial.break_("saved", f"step {newest}, not finite at {step}")
    again = trial.launch()
    trial.check_resumed(again, newest)
    trial.check_end(again)
    return trial, Counter(trials=1)


def nonfinite(tool):
    for where in ("loss", "gradient", "reduced"):
        yield from until(tool, "nonfinite", f"in the {where}", "trials", 14, lambda rng, i, where=where:
                         not_finite(tool, rng, tool.modes[i % len(tool.modes)], where))


# ---- ends

def end(tool, rng, mode, torchrun):
    trial = tool.trial(mode, ["--max_iters=2"], torchrun=torchrun)
    result = trial.launch()
    if set(result.codes) != {0} or result.launcher or result.hung:
        trial.break_("codes", f"{result.codes}, launcher {result.launcher}: {result.err[-600:]}")
    return trial, Counter(ends=1, torchrun=int(torchrun))


def ends(tool):
    for mode in [*tool.modes, "tp"] if tool.modes == SAVED else tool.modes:
        yield from until(tool, "ends", mode, "ends", 100, lambda rng, i, mode=mode:
                         end(tool, rng, mode, tool.torchrun and i % TORCHRUN == 0))


# ---- together

def until(tool, group, row, what, target, trial_of):
    """Do `trial_of(rng, number)` until `target` (times --scale) of `what` are counted; yields the row."""
    target, started, total, broken = max(1, round(target * tool.scale)), time.monotonic(), Counter(), []
    number = 0
    with ThreadPoolExecutor(tool.jobs) as pool:
        while total[what] < target and number < 20 * target:
            def one(i):
                trial, figures = trial_of(random.Random(f"{tool.seed} {group} {row} {i}"), i)
                tool.end(trial)
                return trial.broken, figures

            # As many as are still missing, by what they brought so far.
            rate = max(total[what] / number, 1) if number else 1 if what != "kills" or tool.scale <= 0.02 else 3
            batch = range(number, number + max(1, round((target - total[what]) / rate)))
            for found, figures in pool.map(one, batch):
                broken += found
                total += figures
            number = batch.stop
    yield group, row, total, broken, time.monotonic() - started


GROUPS = {"kills": kills, "damage": lambda tool: damage(tool, until), "disk": disk, "signals": signals,
          "nonfinite": nonfinite, "ends": ends, "malicious": lambda tool: malicious(tool, until)}


def told(group, row, figures, broken, seconds):
    parts = [f"{n} {what}" for what, n in figures.items()]
    parts += [f"BROKEN: {n} {promise}" for promise, n in Counter(p for p, _ in broken).items()] or ["0 broken"]
    return f"{group:<10}{row:<30} {', '.join(parts):<80} {seconds:5.0f} s"


def main(argv):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=["all"], help=f"{', '.join(GROUPS)}, or all")
    parser.add_argument("--seed", type=int, default=1, help="of the trials")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of trials")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials side by side")
    parser.add_argument("--folder", type=Path, default=None, help="where the trials run; default: that of temporaries")
    parser.add_argument("--modes", default=",".join(SAVED), help="of several processes, and single")
    parser.add_argument("--phases", default=",".join(PHASES), help="of a save, for kills and full disks")
    parser.add_argument("--no_torchrun", action="store_true", help="fork all ranks, at a second a run")
    args = parser.parse_args(argv)
    for given, known in ((args.groups, {**GROUPS, "all": 0}), (args.modes.split(","), MODES),
                         (args.phases.split(","), PHASES)):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is unknown{did_you_mean(name, known)}")
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=args.folder))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # small disks are unmounted, whatever ends this
    tool, started, total, all_broken = Tool(folder, args.seed, args.scale), time.monotonic(), {}, []
    tool.jobs, tool.torchrun = args.jobs, not args.no_torchrun
    tool.modes, tool.phases = tuple(args.modes.split(",")), tuple(args.phases.split(","))
    try:
        for name, group in GROUPS.items():
            if name in args.groups or "all" in args.groups:
                for row in group(tool):
                    print(told(*row), flush=True)
                    figures, seconds = total.get(name, (Counter(), 0))
                    total[name] = figures + row[2], seconds + row[4]
                    for promise, detail in row[3]:
                        print(f"  {promise}: {detail}", flush=True)
                    all_broken += [(name, *found) for found in row[3]]
    finally:
        tool.close()
    print(f"\nseed {args.seed}, scale {args.scale:g}, {time.monotonic() - started:.0f} s")
    for name, (figures, seconds) in total.items():
        print(told(name, "in all", figures, [found[1:] for found in all_broken if found[0] == name], seconds))
    if not all_broken:
        shutil.rmtree(folder)
    return 1 if all_broken else 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(sys.argv[1:]))
